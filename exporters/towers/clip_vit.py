"""The vision tower of LLaVA: CLIP up to the layer whose features are taken, then the projector, over kept patches.

Besides the features it gives what a pruner after it looks at: the features before the projector, the attention that the
class token pays each of them in the last layer that runs, and the class token itself. Source of the architecture:
transformers ``models/clip`` and ``models/llava``. C is the width of the tower.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import torch
from torch import Tensor, nn

from ...models.config import ModelConfig, Preprocessing, VisionConfig
from ..layers import LayerNorm, Linear
from ..lowering import ops
from .patches import kept_patches, pixel_constants


class Block(nn.Module):
    """Pre-norm transformer block in which all attend to all."""

    def __init__(self, c: VisionConfig, dtype: torch.dtype, float32_kinds: Set[str]):
        super().__init__()
        self.heads = c.heads
        self.head_dim = c.head_dim
        self.kind = c.mlp
        self.dtype = dtype
        self.float32_mlp = "mlp" in float32_kinds
        self.norm1 = LayerNorm(c.width, c.norm_eps)
        self.norm2 = LayerNorm(c.width, c.norm_eps)
        self.q = Linear(c.width, c.width)
        self.k = Linear(c.width, c.width)
        self.v = Linear(c.width, c.width)
        self.o = Linear(c.width, c.width)
        self.fc1 = Linear(c.width, c.ffn)
        self.fc2 = Linear(c.ffn, c.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [1 + K, C] -> like x, and what attention the first token pays each of the others: float32 [K]."""
        h = self.norm1(x).to(self.dtype)
        q, k, v = (self.by_head(ops.watch("attention", part(h))) for part in (self.q, self.k, self.v))
        paid = self.paid(q.narrow(1, 0, 1).float(), k.float())
        out = ops.attention(q, k, v, self.head_dim**-0.5).reshape(-1, self.heads * self.head_dim)
        out = ops.watch("attention", self.o(out))
        x = ops.watch("residual", x + out.to(x.dtype))
        h = self.norm2(x).to(torch.float32 if self.float32_mlp else self.dtype)
        inner = ops.watch("mlp", self.fc1(h))
        inner = ops.quick_gelu(inner) if self.kind == "quick_gelu" else ops.gelu(inner, "none")
        return ops.watch("residual", x + ops.watch("mlp", self.fc2(inner)).to(x.dtype)), paid

    def by_head(self, x: Tensor) -> Tensor:
        """x [n, C] -> [1, n, heads, Dh]."""
        return x.reshape(1, -1, self.heads, self.head_dim)

    def paid(self, q: Tensor, k: Tensor) -> Tensor:
        """Over all heads, q [1, 1, heads, Dh] and k [1, 1 + K, heads, Dh] -> [K]."""
        paid = torch.softmax((q * self.head_dim**-0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1), dim=3)
        paid = paid.sum(1).reshape(-1)
        return paid.narrow(0, 1, paid.shape[0] - 1)


class Tower(nn.Module):
    """Image and kept indices in, features out, and what pruners look at.

    Constants (``scale``, ``shift``) are buffers filled by ``constants``.
    """

    def __init__(
        self,
        model: ModelConfig,
        cast_first: bool = False,
        dtype: torch.dtype = torch.float32,
        float32_kinds: Set[str] = frozenset(),
    ):
        super().__init__()
        self.c = c = model.vision
        self.cast_to = dtype if cast_first else None
        self.dtype = dtype
        self.residual = torch.float32 if "residual" in float32_kinds else dtype
        self.inner = torch.float32 if "merger" in float32_kinds else dtype
        self.class_embedding = nn.Parameter(torch.empty(c.width))
        self.patch_embed = Linear(c.patch * c.patch * c.channels, c.width, c.patch_bias)
        self.positions = nn.Parameter(torch.empty(c.positions, c.width))
        self.norm = LayerNorm(c.width, c.norm_eps)
        self.blocks = nn.ModuleList(Block(c, dtype, float32_kinds) for _ in range(c.depth))
        self.fc1 = Linear(c.width, c.out_width, c.projector_bias)
        self.fc2 = Linear(c.out_width, c.out_width, c.projector_bias)
        self.row_end = nn.Parameter(torch.empty(c.out_width)) if c.pinpoints else None
        self.register_buffer("scale", torch.empty(c.patch * c.patch * c.channels))
        self.register_buffer("shift", torch.empty(c.patch * c.patch * c.channels))
        for parameter in self.parameters():  # the constants stay float32
            parameter.data = parameter.data.to(dtype)

    def forward(self, image: Tensor, keep: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        """image uint8 [side, side, 3]; keep int32 [K], rising; wanted int32 [U], those of the K that go on.

        Returns features [1, U, D]; hidden [U, C], what they are made of; score float32 [U]; class_feature [1, 1, D];
        where the family has one, newline [1, 1, D].
        """
        c = self.c
        cols = image.shape[1] // c.patch
        row = torch.div(keep, cols, rounding_mode="floor")
        pixels = kept_patches(image, row, keep - row * cols, cols, c, self.cast_to)
        patches = self.patch_embed((pixels * self.scale + self.shift).to(self.dtype)).to(self.residual)
        x = torch.cat((self.class_embedding.unsqueeze(0).to(self.residual), patches))
        places = torch.cat((torch.zeros_like(keep.narrow(0, 0, 1)), keep + 1))
        x = self.norm(x + self.positions.index_select(0, places).to(self.residual))
        for block in self.blocks:
            x, score = block(x)  # the last one's counts
        hidden = x.narrow(0, 1, x.shape[0] - 1).index_select(0, wanted)
        found = (
            self.project(hidden).unsqueeze(0),
            hidden.to(self.dtype),
            score.index_select(0, wanted),
            self.project(x.narrow(0, 0, 1)).unsqueeze(0),
        )
        if self.row_end is None:
            return found
        return *found, self.row_end.reshape(1, 1, -1) * 1  # an output has to come from a node

    def project(self, x: Tensor) -> Tensor:
        """x [n, C] -> [n, D]."""
        inner = ops.gelu(ops.watch("merger", self.fc1(x.to(self.inner))), "none")
        return ops.watch("features", self.fc2(inner)).to(self.dtype)


def other_inputs(c: VisionConfig) -> dict[str, tuple[int | str, ...]]:
    """What the graph takes besides ``image`` and ``keep``, int32: name -> shape, in the letters of models/config.py."""
    return {"wanted": ("U",)}


def constants(model: ModelConfig, pre: Preprocessing) -> dict[str, np.ndarray]:
    """Values of the tower's buffers, float32: pixel scale and shift (mean and std folded)."""
    return pixel_constants(model.vision, pre)
