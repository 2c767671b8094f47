"""Checkpoint -> bundle directory: graphs with streamed weights, tokenizer, chat template, numbers, hashes."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..models import manifest
from ..models.checks import shown
from ..models.config import ModelConfig, Preprocessing
from ..models.errors import CheckpointError
from ..models.hfconfig import Reader, defaults_of
from ..models.manifest import sha256
from ..models.precision import BYTES, Precision, Wanted, resolve
from ..models.pruners import Pruner, settings_of
from ..models.pruners.pixelprune import PixelPrune, prune_file
from ..models.version import __version__
from . import graphs
from .checkpoint import Checkpoint
from .fp16_range import float32_kinds
from .lowering.dialects import DIALECTS, Dialect
from .pruners import Sizes, pruning_graphs
from .run_model import Sample
from .weights.attach import attach, not_in_blocks, weight_bytes
from .weights.gptq import Moments, collect

Progress = Callable[[str, int, int], None]  # stage, done, total
FROM_DTYPE = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
FILES = {"vision": "vision.onnx", "language": "language.onnx"}
HEAD_DIM_STEP = 8  # of GroupQueryAttention; it loads graphs with other widths, and fails when they run
FIXED_RAM = 680_000_000  # bytes: torch, the exporter and one traced graph
# bytes to run the layers in float32: for each value of the largest tensor, and for each unit inside of vision's MLPs
CALIBRATION_RAM = (3, 120_000)
GRAPHS_DISK = 2_000_000  # bytes of all graphs without their weights


@dataclass(frozen=True)
class Plan:
    """What a build will do and what it needs."""

    checkpoint: Checkpoint
    precision: Precision
    dialect: str
    preprocessing: Preprocessing
    prune: tuple[Pruner, ...]  # of requests that do not say how
    weights: int  # bytes of the stored weights
    disk: int  # bytes the bundle takes
    ram: int  # bytes of memory at the peak
    notices: tuple[str, ...]  # what the user should know

    @property
    def compute(self) -> str:
        """What the graphs calculate in."""
        return graphs.compute_precision(self.precision.base, DIALECTS[self.dialect])


def plan(
    path: str | Path,
    wanted: Wanted = Wanted(),  # noqa: B008 (frozen)
    dialect: str = "ort",
    engines: bool = False,
    calibrated: int = 0,
    prune: Sequence[Pruner] = (PixelPrune(),),
) -> Plan:
    """Open and check a checkpoint and estimate what its bundle needs (``engines``: they will be compiled from it).

    ``calibrated``: images that matrices in int4 are fitted to; ``prune``: what the bundle says where requests do not.
    Raises CheckpointError.
    """
    checkpoint = Checkpoint.open(path)
    if dialect not in DIALECTS:
        raise CheckpointError(f"dialect is {dialect!r}, expected one of: {', '.join(DIALECTS)}")
    precision = resolve(wanted, FROM_DTYPE[checkpoint.dtype], dialect, checkpoint.config.text.tied_head, engines)
    head_dim = checkpoint.config.text.head_dim
    if dialect == "ort" and head_dim % HEAD_DIM_STEP:
        raise CheckpointError(
            f"head_dim is {head_dim}, expected a multiple of {HEAD_DIM_STEP} for ONNX Runtime's GroupQueryAttention; "
            "build it with --dialect plain, which runs on a CPU, too"
        )
    if calibrated:
        if _fitted(precision):
            precision = replace(precision, calibrated=calibrated)
        elif graphs.compute_precision(precision.base, DIALECTS[dialect]) != "fp16":
            raise CheckpointError(
                f"found images to calibrate with and weights in {precision}, expected int4 for the decoder's layers or "
                "the vision tower, or graphs in fp16, which are checked on them; add --precision int4, or leave "
                "--calibrate out"
            )
    notices = list(checkpoint.notices)
    if wide := not_in_blocks(checkpoint, precision):
        notices.append(
            f"{len(wide)} matrices stay in {precision.base}: blocks of {precision.block} do not divide their inputs"
        )
    pre = _preprocessing(checkpoint, notices)
    if not (checkpoint.path / "tokenizer.json").is_file():
        hint = ""
        if (checkpoint.path / "vocab.json").is_file():
            hint = " (vocab.json alone is not read; save the tokenizer with transformers to get a tokenizer.json)"
        notices.append(f"no tokenizer.json: the bundle takes token ids only{hint}")
    elif not _chat_template(checkpoint):
        notices.append("no chat template: using the one of the family")
    if not _stop_tokens(checkpoint):
        notices.append("no end-of-sequence token: answers end at their longest length only")
    if (checkpoint.optional_json("generation_config.json") or {}).get("do_sample"):
        notices.append("generation_config.json asks for sampling: requests are greedy unless they ask for it too")
    weights = weight_bytes(checkpoint, precision)
    tokenizer = checkpoint.path / "tokenizer.json"
    disk = int(weights * 1.01) + GRAPHS_DISK + (tokenizer.stat().st_size if tokenizer.is_file() else 0)
    if calibrated:  # moments: while building
        tables = checkpoint.family.weights(checkpoint.config)
        matrices = [w.shape for graph in _fitted(precision) for w in tables[graph].values() if len(w.shape) == 2]
        disk += sum(4 * inner**2 for _, inner in matrices)
    # the largest tensor: as mapped, as read, as converted, as integers
    tables = checkpoint.family.weights(checkpoint.config)
    largest = max(math.prod(weight.shape) for table in tables.values() for weight in table.values())
    ram = FIXED_RAM + largest * (2 * 4 if checkpoint.dtype == "F32" else 2 * 2) + largest * BYTES[precision.base]
    if calibrated:
        per_value, per_unit = CALIBRATION_RAM
        ram += per_value * largest + per_unit * checkpoint.config.vision.ffn
    return Plan(checkpoint, precision, dialect, pre, tuple(prune), weights, disk, ram, tuple(notices))


def _fitted(precision: Precision) -> list[str]:
    """The graphs with layers in int4."""
    return [graph for graph in ("vision", "language") if precision.of(graph) == "int4"]


def export(
    plan: Plan,
    directory: Path,
    progress: Progress,
    screens: np.ndarray,
    samples: Callable[[Path], Sequence[Sample]] = lambda directory: (),
) -> None:
    """Write the bundle's files into an existing empty directory; bundle.json comes last.

    ``screens`` uint8 [H, W, 3], sides multiples of the block: what every fp16 model is tried on. ``samples``: what to
    calibrate with, given the directory with tokenizer.json and chat_template.jinja.
    """
    checkpoint, dialect = plan.checkpoint, DIALECTS[plan.dialect]
    config = checkpoint.config
    progress("trace", 0, 3)
    models: dict[str, ir.Model] = {}
    interface = _copy_text(checkpoint, directory)
    tried = samples(directory)
    kinds = float32_kinds(checkpoint, plan.preprocessing, plan.compute, screens, progress, tried)
    for i, (name, build) in enumerate((("vision", graphs.vision_graph), ("language", graphs.language_graph))):
        progress("trace", i + 1, 3)
        models[name] = build(config, dialect, plan.precision.base, kinds[name])
    progress("trace", 3, 3)
    sizes = Sizes(config.vision.block, config.levels, config.text.width, graphs.PRECISIONS[plan.compute])
    for name, graph in pruning_graphs(sizes, dialect).items():
        ir.save(graph, directory / name)
    with tempfile.TemporaryDirectory(dir=directory) as moments_directory:
        moments: Moments | None = None
        if plan.precision.calibrated:
            where, pre = Path(moments_directory), plan.preprocessing
            moments = collect(checkpoint, pre, tried, _fitted(plan.precision), where, progress)
        for name in ("vision", "language"):
            attach(models[name], checkpoint, name, plan.preprocessing, dialect, plan.precision, moments)
            _save(models[name], directory, name, progress)
    files = _hash(directory, "hash bundle", progress)
    sources = {file.name: file for file in checkpoint.files()}
    progress("hash checkpoint", 0, len(sources))
    hashes = {}
    for i, (name, file) in enumerate(sources.items()):
        hashes[name] = sha256(file)
        progress("hash checkpoint", i + 1, len(sources))
    manifest.write(_manifest(plan, dialect, config, interface, kinds, files, hashes), directory)


def _manifest(
    plan: Plan,
    dialect: Dialect,
    config: ModelConfig,
    interface: str,
    kinds: dict[str, tuple[str, ...]],
    files: dict[str, manifest.FileRecord],
    hashes: dict[str, str],
) -> manifest.Manifest:
    pixel = next((pruner for pruner in plan.prune if isinstance(pruner, PixelPrune)), PixelPrune())
    usual = prune_file(pixel.graph)  # what engines are compiled of
    return manifest.Manifest(
        schema=manifest.SCHEMA,
        family=config.family,
        source=manifest.Source(shown(plan.checkpoint.path.resolve().name), hashes),
        precision=plan.precision,
        compute=plan.compute,
        float32_kinds=kinds,
        interface=interface,
        graphs={name: manifest.Graph(file, dialect.name) for name, file in {"prune": usual, **FILES}.items()},
        model=config,
        preprocessing=plan.preprocessing,
        prune=settings_of(plan.prune),
        context=config.text.context,
        stop_tokens=_stop_tokens(plan.checkpoint),
        versions={
            "ppexport": __version__,
            **{p: importlib.metadata.version(p) for p in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")},
        },
        files=files,
    )


def _save(model: ir.Model, directory: Path, name: str, progress: Progress) -> None:
    """Write name.onnx and name.onnx.data, one weight at a time."""
    stage = f"{name} weights"

    def step(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(stage, info.index, info.total)

    path = directory / f"{name}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data", alignment=4096, align_threshold=4096, callback=step)
    progress(stage, 1, 1)


def _hash(directory: Path, stage: str, progress: Progress) -> dict[str, manifest.FileRecord]:
    paths = sorted(p for p in directory.iterdir() if p.is_file())
    records = {}
    for i, path in enumerate(paths):
        progress(stage, i, len(paths))
        records[path.name] = manifest.FileRecord(path.stat().st_size, sha256(path))
    progress(stage, len(paths), len(paths))
    return records


def _copy_text(checkpoint: Checkpoint, directory: Path) -> str:
    """Copy tokenizer.json and write chat_template.jinja; returns the bundle's interface, "text" or "tokens"."""
    tokenizer = checkpoint.path / "tokenizer.json"
    if not tokenizer.is_file():
        return "tokens"
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    template = _chat_template(checkpoint) or checkpoint.family.chat_template
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return "text"


def _chat_template(checkpoint: Checkpoint) -> str | None:
    """The checkpoint's chat template, from wherever transformers keeps it."""
    file = checkpoint.path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise CheckpointError(f"{file.name} cannot be read: {err}") from err
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = (checkpoint.optional_json(name) or {}).get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next(
                (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
            )
        if isinstance(template, str):
            return template
    return None


def _stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json; every one lies in the vocabulary."""
    raw = (checkpoint.optional_json("generation_config.json") or {}).get("eos_token_id")
    stop = [raw] if isinstance(raw, int) else raw or checkpoint.config.eos_tokens
    vocab = checkpoint.config.text.vocab
    if not isinstance(stop, (list, tuple)) or not all(type(n) is int and 0 <= n < vocab for n in stop):
        where = "generation_config.json" if raw else "config.json"
        raise CheckpointError(f"{where}: eos_token_id is {(raw or stop)!r:.80}, expected token ids under {vocab}")
    return tuple(stop)


# Keys of an image processor that do not change what the model sees.
_HARMLESS = (
    "image_processor_type processor_class data_format input_data_format device return_tensors disable_grouping "
    "default_to_square do_convert_rgb crop_size pad_size image_seq_length"
)


def _image_processor(checkpoint: Checkpoint) -> tuple[str, dict[str, Any] | None]:
    """Where the image processor's configuration lies, and what it says; as transformers, processor_config.json first.

    transformers 5 saves it in there, 4 in a file of its own.
    """
    nested = (checkpoint.optional_json("processor_config.json") or {}).get("image_processor")
    if nested is not None:
        return "processor_config.json: image_processor", nested
    return "preprocessor_config.json", checkpoint.optional_json("preprocessor_config.json")


def _preprocessing(checkpoint: Checkpoint, notices: list[str]) -> Preprocessing:
    """Image numbers of the image processor's configuration, or the family's where it is absent."""
    where, raw = _image_processor(checkpoint)
    default: Preprocessing = checkpoint.family.preprocessing
    if raw is None:
        notices.append(
            "no preprocessor_config.json and no image processor in processor_config.json: using the family's "
            f"{default.min_pixels} to {default.max_pixels} pixels"
        )
        return default
    known = defaults_of(checkpoint.config.family, "preprocessor_config.json")
    r = Reader(raw, where, notices, known, _HARMLESS.split())
    vision = checkpoint.config.vision
    for key, wanted in (
        ("patch_size", vision.patch),
        ("merge_size", vision.merge),
        ("temporal_patch_size", vision.temporal_patch),
        ("resample", 3),  # bicubic
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
    ):
        if key.endswith("_size"):
            if (side := r.side(key, wanted)) != wanted:
                r.fail(f"'{key}' is {side}, expected {wanted}, as in config.json")
        else:
            r.expect(key, wanted, default=wanted)
    if abs(r.get("rescale_factor", float, 1 / 255) * 255 - 1) > 1e-6:
        r.fail(f"rescale_factor is {raw['rescale_factor']}, expected 1/255")
    for key in ("do_center_crop", "do_pad"):
        r.expect(key, False, default=False)
    size = r.section("size")
    low = size.get("shortest_edge", int, default.min_pixels)
    high = size.get("longest_edge", int, default.max_pixels)
    size.finish()
    low, high = r.get("min_pixels", int, low), r.get("max_pixels", int, high)
    if low > high or high < vision.block**2:
        r.fail(f"{low} to {high} pixels, expected a rising range that holds one {vision.block} x {vision.block} block")
    mean = r.triple("image_mean")
    std = r.triple("image_std")
    if min(std) <= 0:
        r.fail(f"image_std is {list(std)}, expected numbers over 0")
    r.finish()
    return Preprocessing(min_pixels=low, max_pixels=high, mean=mean, std=std)
