"""What the Qwen-VL families have in common: views, positions, the decoder's configuration and names of weights.

Source: transformers ``models/qwen2_vl``, ``models/qwen2_5_vl`` and ``models/qwen3_vl`` (4.57 and 5.x write the same
architectures with slightly different keys).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .attention_decoder import (
    HEAD,
    Table,
    decoder_numbers,
    decoder_weights,
    end_tokens,
    is_tied,
    linear,
    norm,
)
from .config import ModelConfig, Preprocessing, TextConfig, VisionConfig, Weight
from .family import Kept, Prompt, View, Views
from .hfconfig import HARMLESS, Reader, defaults_of, known_keys
from .layout import lay_out, on_grid
from .pruners import Pruner
from .pruners.pixelprune import PixelPrune
from .resize import smart_resize

# Buffers that old versions of transformers saved: the graphs calculate them.
BUFFERS = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq)$|(^|\.)position_ids$")
VISION = "model.visual"  # where the weights of the tower lie

# The turns of a conversation; used where a checkpoint has a tokenizer but no chat template.
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class QwenVL:
    """The common part of a family; see family.Family. A family adds the class attributes and the tower."""

    model_type: str
    known_as: str  # the family in models/known_keys.json whose keys it has
    preprocessing: Preprocessing
    chat_template: str
    sections: Sequence[int]  # mRoPE, where the configuration does not say
    interleaved: bool  # are they?
    decoder = "attention"  # its architecture: a file of exporters/decoders
    head = HEAD
    prune: tuple[Pruner, ...] = (PixelPrune(),)

    def parse(self, raw: Mapping[str, Any], notices: list[str] | None = None) -> ModelConfig:
        """See family.Family."""
        ignored = (
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            *known_keys()["generation"],
        )
        harmless = [*HARMLESS, *ignored]
        told = [] if notices is None else notices
        top = Reader(raw, "config.json", told, defaults_of(self.known_as, "config.json"), harmless)
        text_section = self.text_section(top, harmless)
        text_section.get("tie_word_embeddings", bool, None)
        text = self.parse_text(text_section, self.is_tied(top, text_section.raw))
        text_eos = end_tokens(text_section)
        text_section.finish()
        section = top.section("vision_config", defaults_of(self.known_as, "vision_config"), harmless)
        vision = self.parse_vision(section)
        _check_vision(section, vision)
        section.finish()
        if vision.out_width != text.width:
            top.fail(
                f"the vision tower gives features of width {vision.out_width}, expected the decoder's {text.width}"
            )
        if len(vision.deepstack) > text.layers:
            top.fail(
                f"{len(vision.deepstack)} deepstack levels, expected at most {text.layers} (the decoder's layers)"
            )
        model = ModelConfig(
            family=self.model_type,
            tower="qwen_vit",
            decoder=self.decoder,
            vision=vision,
            text=text,
            states=text.states(),
            image_token=top.get("image_token_id", int, at_least=0),
            eos_tokens=end_tokens(top) or text_eos,
        )
        if model.image_token >= text.vocab:
            top.fail(f"image_token_id is {model.image_token}, expected under the vocabulary's {text.vocab}")
        top.finish()
        return model

    def text_section(self, top: Reader, harmless: Sequence[str]) -> Reader:
        """The decoder's configuration, which lies in a section of its own."""
        return top.section("text_config", defaults_of(self.known_as, "text_config"), harmless)

    def is_tied(self, top: Reader, text: Mapping[str, Any]) -> bool:
        """Is the output head the embedding table?"""
        return is_tied(top, text)

    def parse_text(self, r: Reader, tied: bool) -> TextConfig:
        """The decoder's numbers."""
        raise NotImplementedError

    def parse_vision(self, r: Reader) -> VisionConfig:
        """The tower's numbers."""
        raise NotImplementedError

    def vision_weights(self, c: VisionConfig) -> Table:
        """Initializer of the vision graph -> where it lies."""
        raise NotImplementedError

    def weights(self, model: ModelConfig) -> dict[str, Table]:
        """See family.Family."""
        return {"vision": self.vision_weights(model.vision), "language": decoder_weights(model.text)}

    def canonical_name(self, stored: str) -> str | None:
        """See family.Family. Checkpoints of older versions hold ``visual.*`` and ``model.layers.*``."""
        if BUFFERS.search(stored):
            return None
        if stored.startswith("visual."):
            return f"model.{stored}"
        if stored.startswith("model.") and not stored.startswith(("model.visual.", "model.language_model.")):
            return f"model.language_model.{stored.removeprefix('model.')}"
        return stored

    def unused(self, model: ModelConfig, name: str) -> bool:
        """See family.Family."""
        return False

    def views(self, model: ModelConfig, pre: Preprocessing, height: int, width: int) -> Views:
        """See family.Family; the whole image is one view."""
        block = model.vision.block
        return Views.whole(*smart_resize(height, width, block, pre.min_pixels, pre.max_pixels), block)

    def layout(self, model: ModelConfig, ids: np.ndarray, kept: Sequence[Kept]) -> Prompt:
        """See family.Family."""
        return lay_out(ids, model.image_token, kept, model.axes, on_grid)

    def tower_inputs(self, model: ModelConfig, view: View, keep: np.ndarray) -> dict[str, np.ndarray]:
        """See family.Family; the tower takes nothing else."""
        return {}

    def vision_numbers(self, r: Reader, **own: Any) -> VisionConfig:
        """The numbers that all towers have, with a family's ``own``."""
        r.expect("in_channels", 3)
        depth = r.get("depth", int)
        heads = r.get("num_heads", int)
        r.expect("num_hidden_layers", depth, default=depth)  # other names of the two
        r.expect("num_attention_heads", heads, default=heads)
        return VisionConfig(
            depth=depth,
            heads=heads,
            patch=r.side("patch_size"),
            merge=r.get("spatial_merge_size", int),
            temporal_patch=r.side("temporal_patch_size"),
            rope_theta=r.axial_rope_theta(),
            **own,
        )

    def text_numbers(
        self, r: Reader, tied: bool, head_dim: int, qkv_bias: bool, qk_norm: bool, turned: float = 1.0
    ) -> TextConfig:
        """The numbers of a decoder with positions on three axes; ``turned``: see decoder_numbers."""
        return decoder_numbers(r, tied, head_dim, qkv_bias, qk_norm, self.sections, self.interleaved, turned)


def patch_embedding(table: Table, c: VisionConfig) -> None:
    """Enter what makes vectors of patches."""
    kernel = (c.width, c.channels, c.temporal_patch, c.patch, c.patch)
    table["patch_embed.weight"] = Weight(f"{VISION}.patch_embed.proj.weight", kernel, "patch")
    if c.patch_bias:
        table["patch_embed.bias"] = Weight(f"{VISION}.patch_embed.proj.bias", (c.width,))


def block_attention(table: Table, c: VisionConfig, i: int) -> None:
    """Enter norms and attention of block ``i`` of the tower."""
    source = f"{VISION}.blocks.{i}"
    name = f"blocks.{i}"
    norm(table, f"{name}.norm1", f"{source}.norm1", c.width, c.norm)
    linear(table, f"{name}.qkv", f"{source}.attn.qkv", c.width, 3 * c.width)
    linear(table, f"{name}.proj", f"{source}.attn.proj", c.width, c.width)
    norm(table, f"{name}.norm2", f"{source}.norm2", c.width, c.norm)


def merger(table: Table, c: VisionConfig) -> None:
    """Enter the merger of Qwen2-VL and Qwen2.5-VL."""
    merged = c.width * c.merge**2
    norm(table, "merger.norm", f"{VISION}.merger.ln_q", c.width, c.norm)
    linear(table, "merger.fc1", f"{VISION}.merger.mlp.0", merged, merged)
    linear(table, "merger.fc2", f"{VISION}.merger.mlp.2", merged, c.out_width)


def _check_vision(r: Reader, c: VisionConfig) -> None:
    if c.width % c.heads or c.head_dim % 4:
        r.fail(f"hidden_size {c.width} over {c.heads} heads, expected a head width that is a multiple of 4")
    if round(c.positions**0.5) ** 2 != c.positions:
        r.fail(f"num_position_embeddings {c.positions}, expected a square number")
    for key, blocks in (("deepstack_visual_indexes", c.deepstack), ("fullatt_block_indexes", c.full_blocks)):
        if list(blocks) != sorted(set(blocks)) or any(n >= c.depth for n in blocks):
            r.fail(f"{key} {list(blocks)}, expected rising block numbers under {c.depth}")
