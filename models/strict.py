"""JSON <-> frozen dataclasses, strictly: a key that is missing, unknown or of another type is an error."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")
LARGEST = 1 << 63  # numbers are smaller, and finite


class StrictError(ValueError):
    """A value does not fit its declared type; the message starts with the path of the key."""


def to_json(value: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types (tuples become lists when written)."""
    return asdict(value)


def from_json(cls: type[T], data: Any, path: str = "") -> T:
    """Build the dataclass ``cls`` from plain JSON types. Raises StrictError."""
    if not isinstance(data, Mapping):
        raise StrictError(f"{path or cls.__name__}: found {type(data).__name__}, expected an object")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}  # type: ignore[arg-type]
    for key in sorted(required - set(data)):
        raise StrictError(f"{path}{key}: is missing")
    for key in sorted(set(data) - known):
        raise StrictError(f"{path}{key}: unknown key")
    return cls(**{key: _value(hints[key], item, f"{path}{key}") for key, item in data.items()})


def _value(kind: Any, item: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if item is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        return _value(next((k for k in kinds if type(item) is k), kinds[0]), item, path)
    if is_dataclass(kind):
        return from_json(kind, item, f"{path}.")  # type: ignore[arg-type]
    if origin is dict:
        if not isinstance(item, Mapping):
            raise StrictError(f"{path}: found {type(item).__name__}, expected an object")
        return {key: _value(args[1], value, f"{path}.{key}") for key, value in item.items()}
    if origin is tuple:
        if not isinstance(item, (list, tuple)):
            raise StrictError(f"{path}: found {type(item).__name__}, expected a list")
        kinds = [args[0]] * len(item) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(item):
            raise StrictError(f"{path}: found {len(item)} entries, expected {len(kinds)}")
        return tuple(_value(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, item, strict=True)))
    if isinstance(item, (int, float)) and not abs(item) < LARGEST:
        raise StrictError(f"{path}: found {item}, expected a finite number below 2 ** 63")
    if kind is float and isinstance(item, int) and not isinstance(item, bool):
        return float(item)
    if not isinstance(item, kind) or (isinstance(item, bool) and kind is not bool):
        raise StrictError(f"{path}: found {item!r}, expected {kind.__name__}")
    return item
