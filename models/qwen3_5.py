"""Qwen3.5 (Hugging Face ``model_type`` "qwen3_5"): its configuration keys, weight names and defaults.

The tower of Qwen3-VL without deepstack; of the decoder's layers three in four are linear attention.
Source: transformers ``models/qwen3_5``.
"""

from __future__ import annotations

from dataclasses import replace

from .config import DeltaNet, TextConfig
from .hfconfig import Reader
from .qwen3_vl import Qwen3VL

KINDS = ("linear_attention", "full_attention")


class Qwen3_5(Qwen3VL):
    """What it does not say is as in Qwen3-VL."""

    model_type = known_as = "qwen3_5"
    sections = (11, 11, 10)
    decoder = "hybrid"

    def parse_text(self, r: Reader, tied: bool) -> TextConfig:
        """See qwen_vl.QwenVL."""
        r.expect("attention_bias", False)
        text = self.text_numbers(r, tied, r.get("head_dim", int), qkv_bias=False, qk_norm=True, turned=0.25)
        return replace(text, gated=True, norm_offset=True, delta=_delta(r, text.layers))

    def deepstack(self, r: Reader) -> tuple[int, ...]:
        """None; it knows no such key."""
        return ()


def _delta(r: Reader, layers: int) -> DeltaNet:
    """The layers of linear attention, and their numbers."""
    every = r.get("full_attention_interval", int, 4)
    usual = [KINDS[(i + 1) % every == 0] for i in range(layers)]
    kinds = r.get("layer_types", list, usual)
    if len(kinds) != layers or not set(kinds) <= set(KINDS) or KINDS[1] not in kinds:
        r.fail(
            f"layer_types is {kinds!r:.120}, expected {' or '.join(KINDS)} for each of the {layers} layers, and one "
            f"{KINDS[1]} at least"
        )
    delta = DeltaNet(
        layers=tuple(i for i, kind in enumerate(kinds) if kind == KINDS[0]),
        key_heads=r.get("linear_num_key_heads", int),
        value_heads=r.get("linear_num_value_heads", int),
        key_dim=r.get("linear_key_head_dim", int),
        value_dim=r.get("linear_value_head_dim", int),
        kernel=r.get("linear_conv_kernel_dim", int, at_least=2),
    )
    if delta.value_heads % delta.key_heads:
        r.fail(
            f"{delta.value_heads} linear value heads, expected a multiple of the {delta.key_heads} key heads"
        )
    return delta


QWEN3_5 = Qwen3_5()
