"""A Hugging Face checkpoint directory, read one tensor at a time.

Layout: config.json, then model.safetensors or model.safetensors.index.json with its shards; optional
generation_config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja or .json,
preprocessor_config.json or processor_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..models.config import ModelConfig, Weight
from ..models.dtype import BY_SAFETENSORS
from ..models.errors import CheckpointError
from ..models.families import family_of
from ..models.family import Family
from .hub import INDEX, SINGLE, find

ADAPTER = (
    "found an adapter (LoRA) that is not merged, expected a whole model; merge it first, with peft: "
    "model.merge_and_unload().save_pretrained(...), or with the export command of the tool that trained it"
)
ADAPTED = (".lora_", ".base_layer.", ".modules_to_save.")  # in names of what PEFT has not merged
WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
ROWS_AT_ONCE = 4096
VALUES_AT_ONCE = 1 << 24


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise CheckpointError(f"{path.name} cannot be read: {err}") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: found {type(value).__name__}, expected a JSON object")
    return value


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # "F32", "F16" or "BF16"
    name: str  # in that file


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its parsed configuration and where each tensor lies. No tensor is loaded yet."""

    path: Path
    family: Family
    config: ModelConfig
    entries: Mapping[str, Entry]  # by the family's present names
    notices: tuple[str, ...]  # what was ignored of it
    name: str  # of its directory, or on the hub
    revision: str = ""  # its commit on the hub

    @classmethod
    def open(cls, checkpoint: str | Path, revision: str | None = None) -> Checkpoint:
        """Read config.json and the headers of the safetensors files, and check every weight against the family's table.

        ``checkpoint``: a directory, or a name on the hub (exporters/hub.py), of which weights are fetched only if the
        configuration is one that can be exported. Raises CheckpointError with the name of what is missing, extra,
        truncated or of the wrong shape.
        """
        source = find(checkpoint, revision, _configuration)
        path = source.path
        raw, family, config, notices = _configuration(path)
        entries = {
            name: entry
            for name, entry in _named(_entries(path), family).items()
            if not family.unused(config, name)
        }
        if config.text.tied_head and family.head in entries:
            config = _judge_head(config, family, entries, str(raw.get("transformers_version")), notices)
        _check(entries, family, config)
        return cls(path, family, config, entries, tuple(notices), source.name, source.revision)

    @property
    def precision(self) -> str:
        """The widest dtype among the matrices: "fp32", "fp16" or "bf16"; a few vectors may be in float32 anyway."""
        kinds = {entry.dtype for entry in self.entries.values() if len(entry.shape) > 1}
        return "fp32" if len(kinds) > 1 else str(BY_SAFETENSORS[kinds.pop()].precision)

    def optional_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the checkpoint, or None where it is absent."""
        file = self.path / name
        return read_json(file) if file.is_file() else None

    def files(self) -> list[Path]:
        """config.json and the weight files."""
        return [self.path / "config.json", *sorted({entry.file for entry in self.entries.values()})]

    def read(self, weight: Weight) -> torch.Tensor:
        """One tensor, laid out as the graph wants it (see Weight), in the checkpoint's dtype.

        The file is opened for this one read, so that its mapped pages do not stay in memory.
        """
        entry = self.entries[weight.source]
        with safe_open(entry.file, framework="pt") as file:
            tensor = file.get_tensor(entry.name)
            _check_finite(entry, tensor)
            if weight.layout == "transpose":
                return tensor.t().contiguous()
            if weight.layout == "patch":
                summed = tensor.float().sum(2) if tensor.ndim == 5 else tensor.float()
                merged = summed.permute(2, 3, 1, 0)  # [C, 3, p, p] -> [p, p, 3, C]
                return merged.reshape(-1, tensor.shape[0]).contiguous()
            if weight.layout == "one_plus":
                return tensor.float() + 1
            return tensor.clone()


def _configuration(path: Path) -> tuple[dict[str, Any], Family, ModelConfig, list[str]]:
    """config.json, what it is of, and what is ignored of it."""
    if path.is_file():
        raise CheckpointError(
            f"{path}: is a file; expected a Hugging Face checkpoint directory with config.json"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such directory; expected a Hugging Face checkpoint with config.json, or its name on the hub, "
            "such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(f"{path}: {ADAPTER}")
        if (path / "bundle.json").is_file():
            raise CheckpointError(
                f"{path}: is a bundle, expected a checkpoint; engines for a bundle are compiled in place: with "
                "--target, without -o"
            )
        raise CheckpointError(f"{path}: found no config.json; expected a Hugging Face checkpoint directory")
    raw = read_json(path / "config.json")
    family = family_of(raw)
    notices: list[str] = []
    return raw, family, family.parse(raw, notices), notices


def _entries(path: Path) -> dict[str, Entry]:
    """Tensor name -> where it lies, from the headers of all weight files; like transformers, a single file first."""
    single = path / SINGLE
    index = path / INDEX
    if single.is_file():
        return _header(single)
    if not index.is_file():
        hint = (
            " PyTorch .bin files are not read; convert them to safetensors."
            if list(path.glob("*.bin"))
            else ""
        )
        raise CheckpointError(f"{path}: found no {SINGLE} and no {INDEX}.{hint}")
    names = read_json(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(shard, str) for shard in names.values())
    ):
        raise CheckpointError(f"{index.name}: found no weight_map, expected tensor names and their shards")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(
                f"{index.name}: shard {shard!r} is outside the checkpoint, expected a file in it"
            )
        entries.update(_header(path / shard))
    for name, shard in names.items():
        if name not in entries or entries[name].file != path / shard:
            raise CheckpointError(f"{shard}: tensor '{name}' is missing, which {index.name} promises")
    if unlisted := sorted(set(entries) - set(names)):
        raise CheckpointError(
            f"{entries[unlisted[0]].file.name}: holds '{unlisted[0]}', which {index.name} does not list"
        )
    return entries


def _header(file: Path) -> dict[str, Entry]:
    """Shapes and dtypes in one safetensors file; the library checks that the file is as long as its header says."""
    if not file.is_file():
        raise CheckpointError(f"{file.name}: the file is missing; the download may be incomplete")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            entries = {n: Entry(file, tuple(s.get_shape()), s.get_dtype(), n) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as err:
        raise CheckpointError(
            f"{file.name}: not a complete safetensors file ({err}); copy or download it again"
        ) from err
    return entries


def _named(entries: Mapping[str, Entry], family: Family) -> dict[str, Entry]:
    """The tensors of a model by their present names, without buffers. Raises CheckpointError for adapters."""
    found: dict[str, Entry] = {}
    for stored, entry in entries.items():
        if stored.startswith("base_model.model.") or any(part in stored for part in ADAPTED):
            raise CheckpointError(f"{entry.file.name}: holds '{stored}': {ADAPTER}")
        if stored.startswith(WRAPPERS):
            raise CheckpointError(
                f"{entry.file.name}: holds '{stored}', expected names without '{stored.partition('.')[0]}.' in front; "
                "save the model itself, not what wraps it for training (model.module, or model._orig_mod)"
            )
        name = family.canonical_name(stored)
        if name is None:
            continue
        if name in found:
            raise CheckpointError(
                f"'{found[name].name}' and '{stored}' are both '{name}', expected one of them"
            )
        if entry.dtype not in BY_SAFETENSORS:
            raise CheckpointError(
                f"{entry.file.name}: '{stored}' has dtype {entry.dtype}, expected F32, F16 or BF16; "
                "build from the checkpoint that is not quantized"
            )
        found[name] = entry
    return found


def _judge_head(
    config: ModelConfig, family: Family, entries: Mapping[str, Entry], written_by: str, notices: list[str]
) -> ModelConfig:
    """What a stored head is for, where config.json says that the embedding table is the head.

    One that differs from the table is used, as transformers 5 does. Version 4 did not; a checkpoint that it wrote says
    two things at once, and CheckpointError is raised.
    """
    table = next(w for w in family.weights(config)["language"].values() if len(w.shape) == 2)
    if table.source not in entries or _same_values(entries[family.head], entries[table.source]):
        return config
    if written_by.startswith("4."):
        raise CheckpointError(
            f"config.json ties the output head to the embedding table, but '{family.head}' is stored and differs "
            "from it: transformers 4, which wrote this, ignores it, transformers 5 uses it; set tie_word_embeddings "
            "to false in config.json, or remove the tensor"
        )
    notices.append(
        f"config.json ties the output head to the embedding table, but '{family.head}' is stored and differs from it: "
        "the stored one is used, as transformers uses it"
    )
    return replace(config, text=replace(config.text, tied_head=False))


def _same_values(a: Entry, b: Entry) -> bool:
    """Are two matrices equal? Compared some rows at a time."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    with safe_open(a.file, framework="pt") as first, safe_open(b.file, framework="pt") as second:
        one = first.get_slice(a.name)
        other = second.get_slice(b.name)
        return all(
            torch.equal(one[row : row + ROWS_AT_ONCE], other[row : row + ROWS_AT_ONCE])
            for row in range(0, a.shape[0], ROWS_AT_ONCE)
        )


def all_finite(tensor: torch.Tensor) -> bool:
    """Is every value a number? Some values at a time: to look at all at once takes twice the tensor's memory."""
    return all(
        # a sum says so sooner, or may itself overflow
        bool(torch.isfinite(part.sum(dtype=torch.float32))) or bool(torch.isfinite(part).all())
        for part in tensor.reshape(-1).split(VALUES_AT_ONCE)
    )


def _check_finite(entry: Entry, tensor: torch.Tensor) -> None:
    """Raise CheckpointError if a value is not finite."""
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{entry.file.name}: '{entry.name}' holds {bad} of {tensor.numel()} values that are not finite (NaN or "
            "infinite), expected numbers; the training may have diverged: take an earlier checkpoint, or copy it again"
        )


def _check(entries: Mapping[str, Entry], family: Family, config: ModelConfig) -> None:
    """Every weight of the table is there with its shape, and nothing else is."""
    table = {w.source: w for graph in family.weights(config).values() for w in graph.values()}
    missing = sorted(set(table) - set(entries))
    if missing:
        hint = ""
        if missing == [family.head]:
            hint = (
                "; if the embedding table is the output head, set tie_word_embeddings to true at the top of "
            )
            hint += "config.json"
        if any(name.startswith("model.mm_projector.") for name in entries):
            hint = "; its names are those of the original LLaVA code: convert it (convert_llava_weights_to_hf.py)"
        raise CheckpointError(
            f"the checkpoint lacks weights that its configuration asks for ({len(missing)}), first '{missing[0]}'{hint}"
        )
    extra = sorted(set(entries) - set(table) - ({family.head} if config.text.tied_head else set()))
    if extra:
        raise CheckpointError(
            f"{len(extra)} weights are not part of a {config.family} model of this configuration, "
            f"the first is '{extra[0]}'"
        )
    for name, weight in table.items():
        if entries[name].shape != weight.shape:
            raise CheckpointError(
                f"weight '{name}' has shape {list(entries[name].shape)}, expected {list(weight.shape)}"
            )
