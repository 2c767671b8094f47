"""Reading Hugging Face JSON configurations as transformers does, and refusing what these graphs do not compute.

A key that transformers' own configuration class knows (known_keys.json, made from it by tests/known_keys.py) is used,
known to be harmless, or an error unless it has the class's default. A key that the class does not know changes nothing
in transformers either: it is ignored, and a notice names it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError

CLASS_DEFAULT: Any = object()  # where a key is absent: transformers' default, or an error if it has none

# Keys that transformers knows and that do not change what the model computes at inference.
HARMLESS = frozenset(
    [
        "model_type",
        "architectures",
        "transformers_version",
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "dtype",
        "torch_dtype",
        "initializer_range",
        "attention_dropout",
        "bos_token_id",
        "pad_token_id",
        "sep_token_id",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "experts_implementation",
        "is_encoder_decoder",
        "problem_type",
        "id2label",
        "label2id",
        "chunk_size_feed_forward",
        "auto_map",
    ]
)

# Keys that no configuration class declares, but that transformers' caches and masks ask every configuration for.
ASKED_FOR = ("layer_types", "sliding_window", "attention_chunk_size")

NAMES = {Mapping: "an object", list: "a list", (int, list): "a whole number or a list of them"}
QUANTIZED = (
    "the checkpoint is quantized already ({method}), expected weights in F32, F16 or BF16; build from the checkpoint "
    "that it was made of, and let ppexport quantize: --precision int4, int8 or w8a8"
)


@functools.cache
def known_keys() -> dict[str, Any]:
    """models/known_keys.json: "every_section", "generation", and for each family its sections, key -> default."""
    found: dict[str, Any] = json.loads(
        (Path(__file__).parent / "known_keys.json").read_text(encoding="utf-8")
    )
    return found


def defaults_of(family: str, section: str) -> dict[str, Any]:
    """Keys that transformers knows in a section of a family's configuration -> the value where one is absent."""
    keys = known_keys()
    if family not in keys:
        raise CheckpointError(
            f"the keys of {section} are not known for family {family!r}, expected them in models/known_keys.json; "
            "add the family to tests/known_keys.py and run it (docs/add-a-family.md)"
        )
    own: dict[str, Any] = keys[family][section]
    if section == "preprocessor_config.json":
        return own
    return dict.fromkeys(keys["generation"]) | keys["every_section"] | own


class Reader:
    """Typed access to a configuration section that remembers which keys were read.

    ``where`` names the section in messages. ``defaults``: the keys that transformers knows there, and their defaults.
    ``notices``: where ``finish`` tells what was ignored; it raises for keys that transformers knows and nobody asked
    for. A section without ``defaults`` may hold nothing else than what is read.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        notices: list[str],
        defaults: Mapping[str, Any] | None = None,
        harmless: Iterable[str] = (),
    ):
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where}: found {type(raw).__name__}, expected a JSON object")
        self.raw = raw
        self.where = where
        self.notices = notices
        self.defaults = defaults
        self.seen = set(harmless)

    def fail(self, message: str) -> NoReturn:
        """Raise CheckpointError with the section's name in front."""
        raise CheckpointError(f"{self.where}: {message}")

    def get(self, key: str, kind: Any, default: Any = CLASS_DEFAULT, at_least: int = 1) -> Any:
        """The value under ``key``, which must be of ``kind`` (a type or a tuple).

        Where it is absent: ``default`` if one is given, else transformers' own. None counts as absent. An int must be
        ``at_least`` that, a float finite and over 0.
        """
        self.seen.add(key)
        value = self.raw.get(key)
        if value is None and default is CLASS_DEFAULT:
            value = (self.defaults or {}).get(key)
            if value is None:
                self.fail(f"key '{key}' is missing")
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(
                f"'{key}' is {value!r:.80}, expected {NAMES.get(kind, getattr(kind, '__name__', kind))}"
            )
        if kind is int and value < at_least:
            self.fail(f"'{key}' is {value}, expected at least {at_least}")
        if kind is float and not (math.isfinite(value) and value > 0):
            self.fail(f"'{key}' is {value}, expected a finite number over 0")
        return value

    def integers(self, key: str, default: Any = CLASS_DEFAULT) -> tuple[int, ...]:
        """A list of integers that are not negative."""
        values = self.get(key, list, default)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in values):
            self.fail(f"'{key}' is {values!r:.120}, expected a list of whole numbers from 0")
        return tuple(values)

    def triple(self, key: str) -> tuple[float, float, float]:
        """Three finite numbers, one per colour channel."""
        values = self.get(key, list)
        if len(values) != 3 or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            self.fail(f"'{key}' is {values!r}, expected three numbers")
        return float(values[0]), float(values[1]), float(values[2])

    def expect(self, key: str, wanted: Any, default: Any = CLASS_DEFAULT) -> None:
        """Raise unless the value under ``key`` is ``wanted``: the graphs compute nothing else."""
        value = self.get(key, type(wanted), default)
        if value != wanted:
            self.fail(f"'{key}' is {value!r}, expected {wanted!r}: other values are not supported")

    def side(self, key: str, default: Any = CLASS_DEFAULT) -> int:
        """A size that may be given for both sides, which then are equal."""
        value = self.get(key, (int, list), default)
        if isinstance(value, list):
            if not value or any(side != value[0] for side in value) or type(value[0]) is not int:
                self.fail(f"'{key}' is {value!r}, expected one size for both sides")
            value = value[0]
        if value < 1:
            self.fail(f"'{key}' is {value}, expected at least 1")
        return int(value)

    def section(
        self, key: str, defaults: Mapping[str, Any] | None = None, harmless: Iterable[str] = ()
    ) -> Reader:
        """A nested object as a Reader of its own."""
        return Reader(self.get(key, Mapping), f"{self.where}: {key}", self.notices, defaults, harmless)

    def part(
        self, keys: Iterable[str], defaults: Mapping[str, Any] | None = None, harmless: Iterable[str] = ()
    ) -> Reader:
        """These keys of this section as a Reader of their own, which now has to read them."""
        raw = {key: self.raw[key] for key in keys if key in self.raw}
        self.seen.update(raw)
        return Reader(raw, self.where, self.notices, defaults, harmless)

    def said_elsewhere(self, keys: Iterable[str], where: str) -> None:
        """Keys that count in section ``where`` only; those that stand here, too, are ignored, and a notice says so."""
        found = sorted(set(keys) & set(self.raw) - self.seen)
        self.seen.update(found)
        if found:
            listed = ", ".join(f"'{key}'" for key in found)
            self.notices.append(f"{self.where}: ignored, since there is a {where}: {listed}")

    def decoder_rope(self) -> Reader:
        """Rotary settings of the decoder, as transformers takes them: rope_scaling goes before rope_parameters.

        ``rope_theta`` may lie in them or beside them.
        """
        name = "rope_scaling" if self.get("rope_scaling", Mapping, None) else "rope_parameters"
        self.get("rope_parameters", Mapping, None)
        beside = {"rope_theta": self.get("rope_theta", float)}
        return Reader(self.raw.get(name) or {}, f"{self.where}: {name}", self.notices, beside, ["type"])

    def axial_rope_theta(self) -> float:
        """Base of the vision tower's two-dimensional rotary embedding (transformers 5 writes it, 4 implies 10000)."""
        beside = {"rope_theta": self.get("rope_theta", float)}
        raw = self.get("rope_parameters", Mapping, {})
        rope = Reader(raw, f"{self.where}: rope_parameters", self.notices, beside, ["type"])
        rope_type = rope.get("rope_type", str, rope.raw.get("type", "axial"))
        if rope_type not in ("axial", "default"):
            rope.fail(f"rope_type is {rope_type!r}, expected 'axial'")
        theta: float = rope.get("rope_theta", float)
        rope.finish()
        return theta

    def finish(self) -> None:
        """Tell what is ignored; raise CheckpointError for a key that transformers knows and that nobody read."""
        if self.defaults is not None and self.get("quantization_config", Mapping, None):
            self.fail(
                QUANTIZED.format(method=self.raw["quantization_config"].get("quant_method", "unknown method"))
            )
        for key in sorted(set(self.raw) - self.seen):
            value = self.raw[key]
            if self.defaults is None:
                self.fail(
                    f"unknown key '{key}' = {value!r:.80}, expected one of: {', '.join(sorted(self.seen))}"
                )
            if key in ASKED_FOR or key in self.defaults:
                self._unread(key, value, self.defaults.get(key))
            else:
                self.notices.append(f"{self.where}: '{key}' is ignored, as transformers ignores it")

    def _unread(self, key: str, value: Any, default: Any) -> None:
        """Raise CheckpointError unless the value of a key that nobody read is as good as absent."""
        every_layer_sees_all = isinstance(value, list) and all(kind == "full_attention" for kind in value)
        if value is not None and value != default and not (key == "layer_types" and every_layer_sees_all):
            expected = "'full_attention' for every layer" if key == "layer_types" else f"{default!r:.80}"
            self.fail(f"'{key}' is {value!r:.80}, expected {expected}: other values are not supported")
