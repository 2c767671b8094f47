"""The model families: one file for each, by its Hugging Face ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError
from .family import Family
from .llava import LLAVA
from .llava_next import LLAVA_NEXT
from .qwen2_5_vl import QWEN2_5_VL
from .qwen2_vl import QWEN2_VL
from .qwen3_5 import QWEN3_5, QWEN3_5_TEXT
from .qwen3_vl import QWEN3_VL

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAVA, LLAVA_NEXT, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_5, QWEN3_5_TEXT)
}
EXPERTS = ("qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe_text")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``; raises CheckpointError for a family that is not in FAMILIES."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        what = ", a mixture of experts" if name in EXPERTS else ""
        raise CheckpointError(
            f"config.json: model_type is {name!r:.80}{what}, expected one of: {', '.join(sorted(FAMILIES))}. "
            "Other families are not supported yet"
        )
    return FAMILIES[name]
