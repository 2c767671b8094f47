"""Strict reading of Hugging Face JSON configurations: every key is used, known to be harmless, or an error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from .errors import CheckpointError

_REQUIRED: Any = object()

# Keys that configurations carry and that do not change what the model computes at inference.
HARMLESS = frozenset(
    [
        "model_type",
        "architectures",
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "initializer_range",
        "use_cache",
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
        "is_encoder_decoder",
        "problem_type",
        "id2label",
        "label2id",
        "chunk_size_feed_forward",
        "auto_map",
    ]
)


class Reader:
    """Typed access to a configuration section that remembers which keys were read.

    ``where`` names the section in messages. ``finish`` raises for keys that nobody asked for.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, harmless: Iterable[str] = HARMLESS):
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where}: found {type(raw).__name__}, expected a JSON object")
        self.raw, self.where, self.seen = raw, where, set(harmless)

    def fail(self, message: str) -> NoReturn:
        """Raise CheckpointError with the section's name in front."""
        raise CheckpointError(f"{self.where}: {message}")

    def get(self, key: str, kind: Any, default: Any = _REQUIRED, at_least: int = 1) -> Any:
        """The value under ``key``, which must be of ``kind`` (a type or a tuple); None counts as absent.

        An int must be ``at_least`` that, a float finite and over 0.
        """
        self.seen.add(key)
        value = self.raw.get(key)
        if value is None:
            if default is _REQUIRED:
                self.fail(f"key '{key}' is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(f"'{key}' is {value!r}, expected {getattr(kind, '__name__', kind)}")
        if kind is int and value < at_least:
            self.fail(f"'{key}' is {value}, expected at least {at_least}")
        if kind is float and not (math.isfinite(value) and value > 0):
            self.fail(f"'{key}' is {value}, expected a finite number over 0")
        return value

    def integers(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A list of integers that are not negative."""
        values = self.get(key, list, default)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in values):
            self.fail(f"'{key}' is {values!r}, expected a list of integers")
        return tuple(values)

    def triple(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Three finite numbers, one per colour channel."""
        values = self.get(key, list, list(default))
        if len(values) != 3 or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            self.fail(f"'{key}' is {values!r}, expected three numbers")
        return float(values[0]), float(values[1]), float(values[2])

    def expect(self, key: str, wanted: Any, default: Any = _REQUIRED) -> None:
        """Raise unless the value under ``key`` is ``wanted``: the graphs compute nothing else."""
        value = self.get(key, type(wanted), default)
        if value != wanted:
            self.fail(f"'{key}' is {value!r}, expected {wanted!r}: other values are not supported")

    def section(self, key: str) -> Reader:
        """A nested object as a Reader of its own."""
        return Reader(self.get(key, Mapping), f"{self.where}: {key}")

    def rope_parameters(self) -> dict[str, Any]:
        """Rotary settings of the decoder, from the keys of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
        new, old = self.get("rope_parameters", Mapping, None), self.get("rope_scaling", Mapping, None)
        theta = self.get("rope_theta", float, None)
        rope = Reader(new if new is not None else old or {}, f"{self.where}: rope_parameters")
        rope.expect("rope_type", "default", default="default")
        rope.get("type", str, None)
        rope.expect("mrope_interleaved", True, default=True)
        section = rope.integers("mrope_section", [24, 20, 20])
        if len(section) != 3 or min(section) < 1:
            rope.fail(f"mrope_section is {section!r}, expected three positive integers")
        theta = rope.get("rope_theta", float, theta)
        rope.finish()
        if theta is None:
            self.fail("key 'rope_theta' is missing")
        return {"rope_theta": theta, "mrope_section": section}

    def axial_rope_theta(self) -> float:
        """Base of the vision tower's two-dimensional rotary embedding (transformers 5 writes it, 4 implies 10000)."""
        rope = Reader(self.get("rope_parameters", Mapping, {}), f"{self.where}: rope_parameters")
        rope.expect("rope_type", "axial", default="axial")
        theta = rope.get("rope_theta", float, 10000.0)
        rope.finish()
        return theta

    def finish(self) -> None:
        """Raise CheckpointError if the section holds a key that was neither read nor known to be harmless."""
        unknown = sorted(set(self.raw) - self.seen)
        if unknown:
            self.fail(
                f"unknown key '{unknown[0]}' = {self.raw[unknown[0]]!r}; it may change what the model computes, "
                "so it is not ignored. Remove it if it does not"
            )
