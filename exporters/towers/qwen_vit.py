"""The Qwen3-VL vision tower with a variable kept-token axis, from the uint8 image to embeddings.

What is dropped is never gathered, normalised or embedded: the graph reads the pixel rows of the kept blocks only.
Source of the architecture: transformers ``models/qwen3_vl``. T = K * merge**2 patches.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.config import ModelConfig, Preprocessing, VisionConfig
from ..layers import LayerNorm, Linear
from ..lowering import ops


class Block(nn.Module):
    """Pre-norm transformer block with full attention and two-dimensional rotary positions."""

    def __init__(self, c: VisionConfig, dtype: torch.dtype, float32_kinds: Set[str]):
        super().__init__()
        self.heads = c.heads
        self.head_dim = c.head_dim
        self.dtype = dtype
        self.float32_mlp = "mlp" in float32_kinds
        self.norm1 = LayerNorm(c.width, c.norm_eps)
        self.norm2 = LayerNorm(c.width, c.norm_eps)
        self.qkv = Linear(c.width, 3 * c.width)
        self.proj = Linear(c.width, c.width)
        self.fc1 = Linear(c.width, c.ffn)
        self.fc2 = Linear(c.ffn, c.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B * T, width]; cos, sin [B, T, Dh / 2]; mask bool [B, T] or None -> [B * T, width]."""
        B = cos.shape[0]
        width = self.heads * self.head_dim
        qkv = ops.watch("attention", self.qkv(self.norm1(x).to(self.dtype)))
        q, k, v = (
            qkv.narrow(1, i * width, width).reshape(B, -1, self.heads, self.head_dim) for i in range(3)
        )
        q = ops.rotary(q, cos, sin)
        k = ops.rotary(k, cos, sin)
        out = ops.attention(q, k, v, self.head_dim**-0.5, mask).reshape(-1, width)
        out = ops.watch("attention", self.proj(out))
        x = ops.watch("residual", x + out.to(x.dtype))
        h = self.norm2(x).to(torch.float32 if self.float32_mlp else self.dtype)
        inner = ops.gelu(ops.watch("mlp", self.fc1(h)), "tanh")
        return ops.watch("residual", x + ops.watch("mlp", self.fc2(inner)).to(x.dtype))


class Merger(nn.Module):
    """merge x merge patches -> one token of the language model's width; normalises before or after merging."""

    def __init__(self, c: VisionConfig, norm_merged: bool, dtype: torch.dtype, float32_kinds: Set[str]):
        super().__init__()
        self.dtype = dtype
        self.inner = torch.float32 if "merger" in float32_kinds else dtype
        self.merged = c.width * c.merge**2
        self.norm_merged = norm_merged
        self.norm = LayerNorm(self.merged if norm_merged else c.width, c.norm_eps)
        self.fc1 = Linear(self.merged, self.merged)
        self.fc2 = Linear(self.merged, c.out_width)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, width] -> [K, D]."""
        if self.norm_merged:
            x = self.norm(x.reshape(-1, self.merged))
        else:
            x = self.norm(x).reshape(-1, self.merged)
        inner = ops.gelu(ops.watch("merger", self.fc1(x.to(self.inner))), "none")
        return ops.watch("features", self.fc2(inner)).to(self.dtype)


class Tower(nn.Module):
    """Image and kept indices in, features out: the embeddings, and with them the deepstack levels.

    Constants (``scale``, ``shift``, ``inv_freq``) are buffers filled by ``constants``: on the meta device, where
    exports run, they have no values.
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
        self.cast_first = cast_first
        self.dtype = dtype
        self.residual = torch.float32 if "residual" in float32_kinds else dtype
        self.patch_embed = Linear(c.patch * c.patch * c.channels, c.width)
        self.positions = nn.Parameter(torch.empty(c.positions, c.width))
        self.blocks = nn.ModuleList(Block(c, dtype, float32_kinds) for _ in range(c.depth))
        self.merger = Merger(c, False, dtype, float32_kinds)
        self.deepstack = nn.ModuleList(Merger(c, True, dtype, float32_kinds) for _ in c.deepstack)
        self.register_buffer("scale", torch.empty(c.patch * c.patch * c.channels))
        self.register_buffer("shift", torch.empty(c.patch * c.patch * c.channels))
        self.register_buffer("inv_freq", torch.empty(c.head_dim // 4))
        for parameter in self.parameters():  # the constants stay float32
            parameter.data = parameter.data.to(dtype)

    def forward(self, image: Tensor, keep: Tensor) -> Tensor:
        """image uint8 [H, W, 3], H and W multiples of the block; keep int32 [K], rising indices into the N blocks.

        Returns features [1 + L, K, D]: the embeddings, then the deepstack levels.
        """
        c = self.c
        rows = image.shape[0] // c.block
        cols = image.shape[1] // c.block
        row = torch.div(keep, cols, rounding_mode="floor")
        col = keep - row * cols
        pixels = self.gather_blocks(image, row, col, cols)
        y = self.patch_coordinates(row)
        x = self.patch_coordinates(col).transpose(1, 2)
        y, x = (t.expand(-1, c.merge, c.merge).reshape(1, -1).float() for t in (y, x))
        return self.encode(pixels, y, x, rows * c.merge, cols * c.merge)

    def encode(
        self,
        pixels: Tensor,
        y: Tensor,
        x: Tensor,
        height: int | Tensor,
        width: int | Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Patches of one image, or of several padded to one length (training).

        pixels float32 [B * T, patch * patch * 3], 0..255; y, x float32 [B, T], places in a grid of height x width
        patches (numbers, or [B, 1] for different grids); mask bool [B, T], which patches are real. Returns as forward.
        """
        hidden, levels = self.trunk(pixels, y, x, height, width, mask)
        return torch.stack((self.merger(hidden), *levels))

    def trunk(
        self,
        pixels: Tensor,
        y: Tensor,
        x: Tensor,
        height: int | Tensor,
        width: int | Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The blocks: patches as in ``encode`` -> hidden [B * T, width of the tower] and the deepstack levels."""
        hidden = self.patch_embed((pixels * self.scale + self.shift).to(self.dtype)).to(self.residual)
        hidden = hidden + self.position_embedding(y, x, height, width).to(self.residual)
        cos, sin = self.rotary_tables(y, x)
        levels: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, cos, sin, mask)
            if i in self.c.deepstack:
                levels.append(self.deepstack[len(levels)](hidden))
        return hidden, levels

    def gather_blocks(self, image: Tensor, row: Tensor, col: Tensor, cols: int) -> Tensor:
        """Pixels of the kept blocks, patch by patch: float32 [T, patch * patch * 3], 0..255.

        The image is a table of segments, one per pixel row of a block: block * 3 bytes each, contiguous.
        """
        c = self.c
        if self.cast_first:  # 0 ... 255 is exact in 16 bits
            image = image.to(self.dtype)
        segments = image.reshape(-1, c.block * c.channels)
        line = torch.arange(c.block, device=image.device, dtype=torch.int32)
        index = (row.unsqueeze(1) * c.block + line) * cols + col.unsqueeze(1)
        kept = segments.index_select(0, index.reshape(-1))
        kept = kept.reshape(-1, c.merge, c.patch, c.merge, c.patch * c.channels).transpose(2, 3)
        return kept.reshape(-1, c.patch * c.patch * c.channels).float()

    def patch_coordinates(self, block: Tensor) -> Tensor:
        """Patch coordinates inside each block along one axis. block [K] -> [K, merge, 1]."""
        within = torch.arange(self.c.merge, device=block.device, dtype=torch.int32)
        return (block.unsqueeze(1) * self.c.merge + within).unsqueeze(2)

    def position_embedding(self, y: Tensor, x: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
        """The learned square grid, interpolated bilinearly (corners aligned) to the grid of height x width patches.

        y, x float32 [B, T] -> float32 [B * T, width of the tower].
        """
        side = round(self.c.positions**0.5)
        if self.c.merge == 1:  # a picture may be one patch high or wide: that patch has position 0
            height = torch.sym_max(height, 2)
            width = torch.sym_max(width, 2)
        y = (y * (side - 1) / (height - 1)).reshape(-1)
        x = (x * (side - 1) / (width - 1)).reshape(-1)
        top = torch.floor(y)
        left = torch.floor(x)
        down = (y - top).unsqueeze(1)
        right = (x - left).unsqueeze(1)
        bottom = (top + 1).clamp(max=side - 1)
        far = (left + 1).clamp(max=side - 1)
        table = self.positions

        def at(row: Tensor, col: Tensor) -> Tensor:
            return F.embedding((row * side + col).to(torch.int32), table).float()

        upper = at(top, left) * (1 - right) + at(top, far) * right
        lower = at(bottom, left) * (1 - right) + at(bottom, far) * right
        return upper * (1 - down) + lower * down

    def rotary_tables(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, Dh / 2]: the first half of the frequencies turns with y, the second with x."""
        angles = torch.cat((y.unsqueeze(2) * self.inv_freq, x.unsqueeze(2) * self.inv_freq), dim=2)
        return torch.cos(angles).to(self.dtype), torch.sin(angles).to(self.dtype)


def constants(model: ModelConfig, pre: Preprocessing) -> dict[str, np.ndarray]:
    """Values of the tower's buffers, float32: pixel scale and shift (mean and std folded), rotary frequencies."""
    c = model.vision
    mean = np.array(pre.mean)
    std = np.array(pre.std)
    half = c.head_dim // 2
    return {
        "scale": np.tile(1 / (255 * std), c.patch * c.patch).astype(np.float32),
        "shift": np.tile(-mean / std, c.patch * c.patch).astype(np.float32),
        "inv_freq": (1.0 / c.rope_theta ** (np.arange(0, half, 2, dtype=np.float32) / half)).astype(
            np.float32
        ),
    }
