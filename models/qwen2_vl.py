"""Qwen2-VL (Hugging Face ``model_type`` "qwen2_vl"): its configuration keys, weight names and defaults.

Source: transformers ``models/qwen2_vl``. Published checkpoints hold the decoder's configuration at the top of
config.json, transformers 5 writes it as ``text_config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .attention_decoder import Table, linear, refuse_sliding_window
from .config import Preprocessing, TextConfig, VisionConfig
from .hfconfig import Reader, defaults_of
from .qwen_vl import TURNS, VISION, QwenVL, block_attention, merger, patch_embedding

# Used where the checkpoint has no image processor configuration; the values of Qwen/Qwen2-VL-*-Instruct.
PREPROCESSING = Preprocessing(
    min_pixels=3136,
    max_pixels=12845056,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)

# Used where the checkpoint has a tokenizer but no chat template.
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + TURNS
)


class Qwen2VL(QwenVL):
    """Biases of queries, keys and values, a block of rotary frequencies for each axis, no position table."""

    model_type = known_as = "qwen2_vl"
    preprocessing = PREPROCESSING
    chat_template = CHAT_TEMPLATE
    sections = (16, 24, 24)
    interleaved = False

    def text_section(self, top: Reader, harmless: Sequence[str]) -> Reader:
        """The section, or what transformers takes for it where there is none: the decoder's keys at the top."""
        known = defaults_of(self.known_as, "text_config")
        own = [
            key
            for key in (*known, "rope_scaling")
            if key not in ("tie_word_embeddings", "quantization_config")
        ]
        if top.raw.get("text_config") is None:
            return top.part(own, known, harmless)
        section = super().text_section(top, harmless)
        top.said_elsewhere(set(own) - {"eos_token_id"}, "text_config")  # 4.52 to 4.56 wrote both
        return section

    def is_tied(self, top: Reader, text: Mapping[str, Any]) -> bool:
        """See qwen_vl.QwenVL; transformers ties these families, too, where only the text part says so."""
        return super().is_tied(top, text) or text.get("tie_word_embeddings") is True

    def parse_text(self, r: Reader, tied: bool) -> TextConfig:
        """See qwen_vl.QwenVL."""
        width = r.get("hidden_size", int)
        heads = r.get("num_attention_heads", int)
        if width % heads:
            r.fail(f"hidden_size {width}, expected a multiple of the {heads} attention heads")
        r.expect("head_dim", width // heads, default=width // heads)
        config = self.text_numbers(r, tied, width // heads, qkv_bias=True, qk_norm=False)
        refuse_sliding_window(r, config.layers)
        return config

    def parse_vision(self, r: Reader) -> VisionConfig:
        """See qwen_vl.QwenVL."""
        r.expect("hidden_act", "quick_gelu")
        width = r.get("embed_dim", int)
        return self.vision_numbers(
            r,
            width=width,
            ffn=width * r.get("mlp_ratio", int),
            out_width=r.get("hidden_size", int),
            patch_bias=False,
            mlp="quick_gelu",
        )

    def vision_weights(self, c: VisionConfig) -> Table:
        """See qwen_vl.QwenVL."""
        table: Table = {}
        patch_embedding(table, c)
        for i in range(c.depth):
            block_attention(table, c, i)
            linear(table, f"blocks.{i}.fc1", f"{VISION}.blocks.{i}.mlp.fc1", c.width, c.ffn)
            linear(table, f"blocks.{i}.fc2", f"{VISION}.blocks.{i}.mlp.fc2", c.ffn, c.width)
        merger(table, c)
        return table


QWEN2_VL = Qwen2VL()
