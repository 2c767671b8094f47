"""Qwen2.5-VL (Hugging Face ``model_type`` "qwen2_5_vl"): its configuration keys, weight names and defaults.

Source: transformers ``models/qwen2_5_vl``. The decoder is that of Qwen2-VL.
"""

from __future__ import annotations

import numpy as np

from .attention_decoder import Table, linear
from .config import ModelConfig, VisionConfig
from .family import View
from .hfconfig import Reader
from .qwen2_vl import Qwen2VL
from .qwen_vl import VISION, block_attention, merger, patch_embedding


class Qwen25VL(Qwen2VL):
    """Root mean square norms and a gated MLP in the tower, whose patches attend within windows in most blocks."""

    model_type = known_as = "qwen2_5_vl"

    def parse_vision(self, r: Reader) -> VisionConfig:
        """See qwen_vl.QwenVL."""
        r.expect("hidden_act", "silu")
        r.get("tokens_per_second", int)  # of videos
        patch = r.side("patch_size")
        merge = r.get("spatial_merge_size", int)
        window = r.get("window_size", int)
        side = window // merge // patch
        if not side:
            r.fail(
                f"window_size is {window}, expected at least the {patch * merge} pixels of one merged token"
            )
        return self.vision_numbers(
            r,
            width=r.get("hidden_size", int),
            ffn=r.get("intermediate_size", int),
            out_width=r.get("out_hidden_size", int),
            patch_bias=False,
            norm="rms",
            mlp="gated_silu",
            window=side,
            full_blocks=r.integers("fullatt_block_indexes"),
        )

    def vision_weights(self, c: VisionConfig) -> Table:
        """See qwen_vl.QwenVL."""
        table: Table = {}
        patch_embedding(table, c)
        for i in range(c.depth):
            block_attention(table, c, i)
            for part, inner, outer in (
                ("gate", c.width, c.ffn),
                ("up", c.width, c.ffn),
                ("down", c.ffn, c.width),
            ):
                linear(table, f"blocks.{i}.{part}", f"{VISION}.blocks.{i}.mlp.{part}_proj", inner, outer)
        merger(table, c)
        return table

    def tower_inputs(self, model: ModelConfig, view: View, keep: np.ndarray) -> dict[str, np.ndarray]:
        """See family.Family and ``windows_of``."""
        windows, places = windows_of(view.grid[1], model.vision.window, keep)
        return {"windows": windows, "in_windows": places}


def windows_of(columns: int, side: int, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a grid with so many columns that keep any of their side x side tokens.

    keep int32 [K], rising -> windows int32 [G, side * side], which of the K lie in each, -1 where none does; places
    int32 [K], where each of them lies in ``windows``, counted through all rows.
    """
    row, column = np.divmod(keep, columns)
    window = row // side * -(-columns // side) + column // side
    order = np.argsort(window, kind="stable")
    _, first, counts = np.unique(window[order], return_index=True, return_counts=True)
    number = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(keep)) - np.repeat(first, counts)
    windows = np.full((len(counts), side * side), -1, np.int32)
    windows[number, within] = order
    places = np.empty(len(keep), np.int32)
    places[order] = number * side * side + within
    return windows, places


QWEN2_5_VL = Qwen25VL()
