"""Language decoders in torch: tokens and features in, logits and states out. One file per architecture.

A file has a class ``Decoder(model, dtype, float32_kinds)`` whose layers lie in ``layers``, and ``constants(model)``,
the values of its buffers. ``forward`` is ``hidden`` (all layers), then ``logits`` (the head): calibration and checks of
ranges run the first alone, at every position.
"""

from __future__ import annotations

from types import ModuleType

from . import attention, hybrid

DECODERS: dict[str, ModuleType] = {"attention": attention, "hybrid": hybrid}  # by ModelConfig.decoder
