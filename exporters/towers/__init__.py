"""Vision towers in torch: image and kept tokens in, features out. One file per architecture.

A file has a class ``Tower(model, cast_first, dtype, float32_kinds)`` whose layers lie in ``blocks``,
``constants(model, preprocessing)``, the values of its buffers, and ``other_inputs(model.vision)``, the shapes of what
its graph takes besides ``image`` and ``keep`` (Family.tower_inputs).
"""

from __future__ import annotations

from types import ModuleType

from . import clip_vit, qwen_vit

TOWERS: dict[str, ModuleType] = {"clip_vit": clip_vit, "qwen_vit": qwen_vit}  # by ModelConfig.tower
