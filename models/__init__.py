"""The model families, as data: one module per Hugging Face ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from . import qwen3_vl
from .errors import CheckpointError

FAMILIES: dict[str, ModuleType] = {module.MODEL_TYPE: module for module in (qwen3_vl,)}


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """The family module of a ``config.json``; raises CheckpointError for a family that is not in FAMILIES."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"config.json: model_type is {name!r}, expected one of: {', '.join(sorted(FAMILIES))}. "
            "Other families are not supported yet"
        )
    return FAMILIES[name]
