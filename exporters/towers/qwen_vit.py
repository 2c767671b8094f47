"""The vision tower of Qwen-VL models with a variable kept-token axis, from the uint8 image to embeddings.

What is dropped is never gathered, normalised or embedded: the graph reads the pixel rows of the kept blocks only.
Source of the architecture: transformers ``models/qwen2_vl``, ``models/qwen2_5_vl`` (windows) and ``models/qwen3_vl``
(position table, deepstack). T = K * merge**2 patches, G windows that keep any of theirs.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.config import ModelConfig, Preprocessing, VisionConfig
from ..layers import NORMS, Linear
from ..lowering import ops
from .patches import kept_patches, pixel_constants


@dataclass(frozen=True)
class Windows:
    """Who attends to whom in the blocks with windows."""

    rows: Tensor  # int32 [G * patches of a window]: the patch that stands there, any where none does
    real: Tensor  # bool [G, patches of a window]: does one?
    places: Tensor  # int32 [T]: where each patch stands among the rows

    @classmethod
    def of_patches(cls, windows: Tensor, in_windows: Tensor, unit: int) -> Windows:
        """From merged tokens of ``unit`` patches: windows int32 [G, side * side], in_windows int32 [K]."""
        patch = torch.arange(unit, device=windows.device, dtype=torch.int32)
        rows = (windows.clamp(min=0).unsqueeze(2) * unit + patch).reshape(-1)
        real = (windows >= 0).unsqueeze(2).expand(-1, -1, unit).reshape(-1, windows.shape[1] * unit)
        return cls(rows, real, (in_windows.unsqueeze(1) * unit + patch).reshape(-1))


class Block(nn.Module):
    """Pre-norm transformer block with two-dimensional rotary positions; patches attend to all, or within windows."""

    def __init__(self, c: VisionConfig, dtype: torch.dtype, float32_kinds: Set[str]):
        super().__init__()
        self.heads = c.heads
        self.head_dim = c.head_dim
        self.kind = c.mlp
        self.dtype = dtype
        self.float32_mlp = "mlp" in float32_kinds
        self.norm1 = NORMS[c.norm](c.width, c.norm_eps)
        self.norm2 = NORMS[c.norm](c.width, c.norm_eps)
        self.qkv = Linear(c.width, 3 * c.width)
        self.proj = Linear(c.width, c.width)
        if c.mlp == "gated_silu":
            self.gate = Linear(c.width, c.ffn)
            self.up = Linear(c.width, c.ffn)
            self.down = Linear(c.ffn, c.width)
        else:
            self.fc1 = Linear(c.width, c.ffn)
            self.fc2 = Linear(c.ffn, c.width)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        windows: Windows | None = None,
    ) -> Tensor:
        """x [B * T, width]; cos, sin [B, T, Dh / 2]; mask bool [B, T] or None -> [B * T, width].

        With ``windows``, B is 1, and patches attend within them.
        """
        B = cos.shape[0]
        width = self.heads * self.head_dim
        qkv = ops.watch("attention", self.qkv(self.norm1(x).to(self.dtype)))
        q, k, v = (
            qkv.narrow(1, i * width, width).reshape(B, -1, self.heads, self.head_dim) for i in range(3)
        )
        q = ops.rotary(q, cos, sin)
        k = ops.rotary(k, cos, sin)
        if windows is None:
            out = ops.attention(q, k, v, self.head_dim**-0.5, mask).reshape(-1, width)
        else:
            out = self.attend_within(q, k, v, windows)
        out = ops.watch("attention", self.proj(out))
        x = ops.watch("residual", x + out.to(x.dtype))
        h = self.norm2(x).to(torch.float32 if self.float32_mlp else self.dtype)
        return ops.watch("residual", x + ops.watch("mlp", self.mlp(h)).to(x.dtype))

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
        """q, k, v [1, T, heads, Dh] -> [T, width]: every window is a row of a batch, filled up to its full size."""
        size = windows.real.shape[1]
        q, k, v = (
            x.reshape(-1, self.heads * self.head_dim)
            .index_select(0, windows.rows)
            .reshape(-1, size, self.heads, self.head_dim)
            for x in (q, k, v)
        )
        out = ops.attention(q, k, v, self.head_dim**-0.5, windows.real)
        return out.reshape(-1, self.heads * self.head_dim).index_select(0, windows.places)

    def mlp(self, h: Tensor) -> Tensor:
        """h [T, width] -> [T, width]."""
        if self.kind == "gated_silu":
            gate = ops.watch("mlp", self.gate(h))
            up = ops.watch("mlp", self.up(h))
            return self.down(ops.watch("mlp", F.silu(gate) * up))
        inner = ops.watch("mlp", self.fc1(h))
        return self.fc2(ops.quick_gelu(inner) if self.kind == "quick_gelu" else ops.gelu(inner, "tanh"))


class Merger(nn.Module):
    """merge x merge patches -> one token of the language model's width; normalises before or after merging."""

    def __init__(self, c: VisionConfig, norm_merged: bool, dtype: torch.dtype, float32_kinds: Set[str]):
        super().__init__()
        self.dtype = dtype
        self.inner = torch.float32 if "merger" in float32_kinds else dtype
        self.merged = c.width * c.merge**2
        self.norm_merged = norm_merged
        self.norm = NORMS[c.norm](self.merged if norm_merged else c.width, c.norm_eps)
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
        self.patch_embed = Linear(c.patch * c.patch * c.channels, c.width, c.patch_bias)
        if c.positions:
            self.positions = nn.Parameter(torch.empty(c.positions, c.width))
        self.blocks = nn.ModuleList(Block(c, dtype, float32_kinds) for _ in range(c.depth))
        self.merger = Merger(c, False, dtype, float32_kinds)
        self.deepstack = nn.ModuleList(Merger(c, True, dtype, float32_kinds) for _ in c.deepstack)
        self.register_buffer("scale", torch.empty(c.patch * c.patch * c.channels))
        self.register_buffer("shift", torch.empty(c.patch * c.patch * c.channels))
        self.register_buffer("inv_freq", torch.empty(c.head_dim // 4))
        for parameter in self.parameters():  # the constants stay float32
            parameter.data = parameter.data.to(dtype)

    def forward(
        self, image: Tensor, keep: Tensor, windows: Tensor | None = None, in_windows: Tensor | None = None
    ) -> Tensor:
        """image uint8 [H, W, 3], H and W multiples of the block; keep int32 [K], rising indices into the N blocks.

        Towers with windows take those that keep any token: windows int32 [G, side * side], which of the K lie in each
        (-1: none), and in_windows int32 [K], where each of the K lies among their places. Returns features
        [1 + L, K, D]: the embeddings, then the deepstack levels.
        """
        c = self.c
        rows = image.shape[0] // c.block
        cols = image.shape[1] // c.block
        row = torch.div(keep, cols, rounding_mode="floor")
        col = keep - row * cols
        pixels = kept_patches(image, row, col, cols, c, self.dtype if self.cast_first else None)
        y = self.patch_coordinates(row)
        x = self.patch_coordinates(col).transpose(1, 2)
        y, x = (t.expand(-1, c.merge, c.merge).reshape(1, -1).float() for t in (y, x))
        within = None
        if windows is not None and in_windows is not None:
            within = Windows.of_patches(windows, in_windows, c.merge**2)
        return self.encode(pixels, y, x, rows * c.merge, cols * c.merge, windows=within)

    def encode(
        self,
        pixels: Tensor,
        y: Tensor,
        x: Tensor,
        height: int | Tensor,
        width: int | Tensor,
        mask: Tensor | None = None,
        windows: Windows | None = None,
    ) -> Tensor:
        """Patches of one image, or of several padded to one length (training).

        pixels float32 [B * T, patch * patch * 3], 0..255; y, x float32 [B, T], places in a grid of height x width
        patches (numbers, or [B, 1] for different grids); mask bool [B, T], which patches are real. Returns as forward.
        """
        hidden, levels = self.trunk(pixels, y, x, height, width, mask, windows)
        return torch.stack((self.merger(hidden), *levels))

    def trunk(
        self,
        pixels: Tensor,
        y: Tensor,
        x: Tensor,
        height: int | Tensor,
        width: int | Tensor,
        mask: Tensor | None,
        windows: Windows | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The blocks: patches as in ``encode`` -> hidden [B * T, width of the tower] and the deepstack levels."""
        hidden = self.patch_embed((pixels * self.scale + self.shift).to(self.dtype)).to(self.residual)
        if self.c.positions:
            hidden = hidden + self.position_embedding(y, x, height, width).to(self.residual)
        cos, sin = self.rotary_tables(y, x)
        levels: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, cos, sin, mask, None if i in self.c.full_blocks else windows)
            if i in self.c.deepstack:
                levels.append(self.deepstack[len(levels)](hidden))
        return hidden, levels

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


def other_inputs(c: VisionConfig) -> dict[str, tuple[int | str, ...]]:
    """What the graph takes besides ``image`` and ``keep``, int32: name -> shape, in the letters of models/config.py."""
    return {"windows": ("G", c.window**2), "in_windows": ("K",)} if c.window else {}


def constants(model: ModelConfig, pre: Preprocessing) -> dict[str, np.ndarray]:
    """Values of the tower's buffers, float32: pixel scale and shift (mean and std folded), rotary frequencies."""
    c = model.vision
    half = c.head_dim // 2
    return {
        **pixel_constants(c, pre),
        "inv_freq": (1.0 / c.rope_theta ** (np.arange(0, half, 2, dtype=np.float32) / half)).astype(
            np.float32
        ),
    }
