"""Qwen3.5 (Hugging Face ``model_type`` "qwen3_5"): its configuration keys, weight names and defaults.

The tower of Qwen3-VL without deepstack; of the decoder's layers three in four are linear attention.
Source: transformers ``models/qwen3_5``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .attention_decoder import Table, decoder_weights, end_tokens
from .config import NO_TOWER, DeltaNet, ModelConfig, Preprocessing, TextConfig
from .errors import ImageError
from .family import Views
from .hfconfig import HARMLESS, Reader, defaults_of, known_keys
from .qwen3_vl import Qwen3VL
from .qwen_vl import VISION

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

    def unused(self, model: ModelConfig, name: str) -> bool:
        """See family.Family: the layers that guess several tokens ahead."""
        return name.startswith("mtp.")


class Qwen3_5Text(Qwen3_5):
    """The decoder alone."""

    model_type = "qwen3_5_text"
    prune = ()

    def parse(self, raw: Mapping[str, Any], notices: list[str] | None = None) -> ModelConfig:
        """See family.Family."""
        told = [] if notices is None else notices
        harmless = [*HARMLESS, *known_keys()["generation"]]
        r = Reader(raw, "config.json", told, defaults_of(self.known_as, "text_config"), harmless)
        text = self.parse_text(r, self.is_tied(r, raw))
        model = ModelConfig(
            family=self.model_type,
            tower="",
            decoder=self.decoder,
            vision=NO_TOWER,
            text=text,
            states=text.states(),
            image_token=-1,
            eos_tokens=end_tokens(r),
        )
        r.finish()
        return model

    def weights(self, model: ModelConfig) -> dict[str, Table]:
        """See family.Family."""
        return {"language": decoder_weights(model.text)}

    def views(self, model: ModelConfig, pre: Preprocessing, height: int, width: int) -> Views:
        """See family.Family; there are none."""
        raise ImageError(f"found an image, expected none: a {self.model_type} model takes text only")

    def unused(self, model: ModelConfig, name: str) -> bool:
        """See family.Family: a tower, where a whole checkpoint is said to be a decoder."""
        return super().unused(model, name) or name.startswith(f"{VISION}.")


def _delta(r: Reader, layers: int) -> DeltaNet:
    """The layers of linear attention, and their numbers."""
    every = r.get("full_attention_interval", int, 4)
    usual = [KINDS[(i + 1) % every == 0] for i in range(layers)]
    kinds = r.get("layer_types", list, usual)
    if len(kinds) != layers or any(kind not in KINDS for kind in kinds) or KINDS[1] not in kinds:
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
QWEN3_5_TEXT = Qwen3_5Text()
