"""Qwen3-VL (Hugging Face ``model_type`` "qwen3_vl"): its configuration keys, weight names and defaults.

Source: transformers ``models/qwen3_vl``.
"""

from __future__ import annotations

from .attention_decoder import Table, linear, norm
from .config import Preprocessing, TextConfig, VisionConfig, Weight
from .hfconfig import Reader
from .qwen_vl import TURNS, VISION, QwenVL, block_attention, patch_embedding

# Used where the checkpoint has no image processor configuration; the values of Qwen/Qwen3-VL-*-Instruct.
PREPROCESSING = Preprocessing(
    min_pixels=65536, max_pixels=16777216, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


class Qwen3VL(QwenVL):
    """A learned position table, deepstack levels, norms of queries and keys, rotary axes by turns."""

    model_type = known_as = "qwen3_vl"
    preprocessing = PREPROCESSING
    chat_template = TURNS
    sections = (24, 20, 20)
    interleaved = True

    def parse_text(self, r: Reader, tied: bool) -> TextConfig:
        """See qwen_vl.QwenVL."""
        r.expect("attention_bias", False)
        return self.text_numbers(r, tied, r.get("head_dim", int), qkv_bias=False, qk_norm=True)

    def parse_vision(self, r: Reader) -> VisionConfig:
        """See qwen_vl.QwenVL."""
        r.expect("hidden_act", "gelu_pytorch_tanh")
        return self.vision_numbers(
            r,
            width=r.get("hidden_size", int),
            ffn=r.get("intermediate_size", int),
            out_width=r.get("out_hidden_size", int),
            positions=r.get("num_position_embeddings", int),
            deepstack=self.deepstack(r),
        )

    def deepstack(self, r: Reader) -> tuple[int, ...]:
        """Blocks whose output goes to the first language layers."""
        return r.integers("deepstack_visual_indexes")

    def vision_weights(self, c: VisionConfig) -> Table:
        """See qwen_vl.QwenVL."""
        table: Table = {}
        patch_embedding(table, c)
        table["positions"] = Weight(f"{VISION}.pos_embed.weight", (c.positions, c.width))
        for i in range(c.depth):
            block_attention(table, c, i)
            linear(table, f"blocks.{i}.fc1", f"{VISION}.blocks.{i}.mlp.linear_fc1", c.width, c.ffn)
            linear(table, f"blocks.{i}.fc2", f"{VISION}.blocks.{i}.mlp.linear_fc2", c.ffn, c.width)
        _merger(table, c, "merger", "merger", c.width)
        for i in range(len(c.deepstack)):
            _merger(table, c, f"deepstack.{i}", f"deepstack_merger_list.{i}", c.width * c.merge**2)
        return table


def _merger(table: Table, c: VisionConfig, name: str, source: str, norm_width: int) -> None:
    merged = c.width * c.merge**2
    norm(table, f"{name}.norm", f"{VISION}.{source}.norm", norm_width)
    linear(table, f"{name}.fc1", f"{VISION}.{source}.linear_fc1", merged, merged)
    linear(table, f"{name}.fc2", f"{VISION}.{source}.linear_fc2", merged, c.out_width)


QWEN3_VL = Qwen3VL()
