"""The Qwen3-VL decoder: one graph for prefill and decode, with the features of images put in where they stand.

Source of the architecture: transformers ``models/qwen3_vl`` (interleaved mRoPE, q/k norm, deepstack).
"""

from __future__ import annotations

import math
from collections.abc import Set

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.config import TextConfig
from ..layers import Linear
from ..lowering import ops


class Layer(nn.Module):
    """Pre-norm decoder layer: grouped-query attention over the cache, gated MLP."""

    def __init__(self, c: TextConfig, dtype: torch.dtype, wide: Set[str]):
        super().__init__()
        self.c, self.dtype, self.wide_mlp = c, dtype, "mlp" in wide
        self.norm1, self.norm2 = nn.Parameter(torch.empty(c.width)), nn.Parameter(torch.empty(c.width))
        self.q, self.o = Linear(c.width, c.heads * c.head_dim, False), Linear(c.heads * c.head_dim, c.width, False)
        self.k, self.v = (Linear(c.width, c.kv_heads * c.head_dim, False) for _ in range(2))
        self.q_norm, self.k_norm = nn.Parameter(torch.empty(c.head_dim)), nn.Parameter(torch.empty(c.head_dim))
        self.gate, self.up = (Linear(c.width, c.ffn, False) for _ in range(2))
        self.down = Linear(c.ffn, c.width, False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, own: Tensor, entries: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> x [B, S, D] and the updated caches [B, kv_heads, M, Dh]."""
        c = self.c
        B, S, _ = x.shape
        h = ops.rms_norm(x, self.norm1.to(x.dtype), c.norm_eps).to(self.dtype)
        q, k, v = (ops.watch("attention", part(h)).reshape(B, S, -1, c.head_dim) for part in (self.q, self.k, self.v))
        q, k = ops.rms_norm(q, self.q_norm, c.norm_eps), ops.rms_norm(k, self.k_norm, c.norm_eps)
        q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
        out, k_cache, v_cache = ops.cached_attention(q, k, v, k_cache, v_cache, own, entries, c.head_dim**-0.5)
        out = ops.watch("attention", self.o(out.reshape(B, S, c.heads * c.head_dim)))
        x = ops.watch("residual", x + out.to(x.dtype))
        h = ops.rms_norm(x, self.norm2.to(x.dtype), c.norm_eps).to(self.dtype)
        if self.wide_mlp:
            h = h.float()
        gate, up = ops.watch("mlp", self.gate(h)), ops.watch("mlp", self.up(h))
        inner = ops.watch("mlp", F.silu(gate) * up)
        x = x + ops.watch("mlp", self.down(inner)).to(x.dtype)
        return ops.watch("residual", x), k_cache, v_cache


class Decoder(nn.Module):
    """Token ids and features of images in, logits at the wanted positions out, caches updated."""

    def __init__(self, c: TextConfig, dtype: torch.dtype = torch.float32, wide: Set[str] = frozenset()):
        super().__init__()
        self.c, self.dtype = c, dtype
        self.residual = torch.float32 if "residual" in wide else dtype
        self.token_table = nn.Parameter(torch.empty(c.vocab, c.width))
        self.layers = nn.ModuleList(Layer(c, dtype, wide) for _ in range(c.layers))
        self.norm = nn.Parameter(torch.empty(c.width))
        self.head = None if c.tied_head else nn.Parameter(torch.empty(c.vocab, c.width))
        self.register_buffer("axis_freq", torch.empty(3, c.head_dim // 2))
        for parameter in self.parameters():  # the constants stay float32
            parameter.data = parameter.data.to(dtype)

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        feature_rows: Tensor,
        position_ids: Tensor,
        start: Tensor,
        logits_at: Tensor,
        caches: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run S more tokens of each row.

        input_ids int32 [B, S]; features [1 + L, K, D], K at least 1: embeddings and deepstack levels of images;
        feature_rows int32 [B, S]: which of the K stands at a position, -1 where a token does; position_ids int32
        [3, B, S] (temporal, height, width); start int32 [B], entries already in the cache; logits_at int32 [B, P],
        positions in S; caches: key, value per layer, [B, kv_heads, M, Dh] each. Returns logits float32 [B, P, V] and
        the caches in the same order.
        """
        B, S = input_ids.shape
        is_image = (feature_rows >= 0).unsqueeze(2)
        row = feature_rows.clamp(min=0).reshape(-1)

        def placed(level: int) -> Tensor:
            return features.select(0, level).index_select(0, row).reshape(B, S, -1)

        x = torch.where(is_image, placed(0), F.embedding(input_ids, self.token_table)).to(self.residual)
        image_gate = is_image.to(self.residual)
        cos, sin = self.rotary_tables(position_ids)
        own = start.unsqueeze(1) + torch.arange(S, device=start.device, dtype=torch.int32)
        entries = torch.arange(caches[0].shape[2], device=start.device, dtype=torch.int32)
        new_caches = []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, cos, sin, caches[2 * i], caches[2 * i + 1], own, entries)
            new_caches += [k, v]
            if i + 1 < features.shape[0]:
                x = ops.watch("residual", x + placed(i + 1).to(self.residual) * image_gate)
        return self.logits(x, logits_at), *new_caches

    def rotary_tables(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, Dh / 2]; frequency i turns with the axis that ``axis_freq`` gives it."""
        angles = (position_ids.unsqueeze(3).float() * self.axis_freq.unsqueeze(1).unsqueeze(1)).sum(0)
        cos, sin = torch.cos(angles), torch.sin(angles)
        if self.c.yarn is not None and self.c.yarn.attention_factor != 1:
            cos = cos * self.c.yarn.attention_factor
            sin = sin * self.c.yarn.attention_factor
        return cos.to(self.dtype), sin.to(self.dtype)

    def logits(self, x: Tensor, logits_at: Tensor) -> Tensor:
        """Hidden states x [B, S, D] -> float32 logits [B, P, V] at the wanted positions only."""
        B, S, D = x.shape
        first = torch.arange(B, device=x.device, dtype=torch.int32).unsqueeze(1) * S
        wanted = x.reshape(-1, D).index_select(0, (first + logits_at).reshape(-1))
        table = self.token_table if self.head is None else self.head
        wanted = ops.rms_norm(wanted, self.norm.to(x.dtype), self.c.norm_eps).to(self.dtype)
        out = F.linear(wanted, table)
        return out.float().reshape(B, -1, self.c.vocab)


def constants(c: TextConfig) -> dict[str, np.ndarray]:
    """Values of the decoder's buffers: ``axis_freq`` float32 [3, Dh / 2].

    Interleaved mRoPE: frequency i belongs to height if i % 3 == 1 and to width if i % 3 == 2, as long as it lies in
    the first 3 * section frequencies of that axis, else to time; the other two rows are zero.
    """
    half = c.head_dim // 2
    inv_freq = _frequencies(c)
    axis = np.zeros(half, np.int64)
    for a in (1, 2):
        axis[a : 3 * c.mrope_section[a] : 3] = a
    return {"axis_freq": np.where(axis == np.arange(3)[:, None], inv_freq, 0).astype(np.float32)}


def _frequencies(c: TextConfig) -> np.ndarray:
    """Angle per position of each pair of a head's values: float32 [Dh / 2].

    With YaRN, frequencies that turn fewer than ``beta_slow`` times within the context of the training are divided by
    ``factor``, those that turn more than ``beta_fast`` times stay, and a linear ramp lies between. Source: transformers
    ``modeling_rope_utils._compute_yarn_parameters``.
    """
    exponents = np.arange(c.head_dim // 2, dtype=np.float32) * 2 / c.head_dim
    inv_freq = 1.0 / c.rope_theta**exponents
    yarn = c.yarn
    if yarn is None:
        return inv_freq

    def pair_that_turns(times: float, context: int = yarn.original_context) -> float:
        return c.head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    high = high + 0.001 if high == low else high
    stretched = np.clip((np.arange(c.head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return inv_freq / yarn.factor * stretched + inv_freq * (1 - stretched)
