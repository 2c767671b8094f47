"""A decoder of attention layers: one graph for prefill and decode, with the features of images put in where they stand.

Layers of another kind take two states, too (hybrid.py).

Source of the architecture: transformers ``models/qwen2_vl`` (biases of q, k and v, rotary positions on several axes)
and ``models/qwen3_vl`` (q/k norm, deepstack).
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.config import ModelConfig, TextConfig
from ..layers import Linear, RMSNorm
from ..lowering import ops
from .rotary import attention_factor, axis_frequencies

FLOAT32 = (".dt_bias", ".log_decay")  # exponents, of hybrid.py


class Block(nn.Module):
    """Pre-norm decoder layer, without what mixes tokens: its norms, and a gated MLP."""

    def __init__(self, c: TextConfig, dtype: torch.dtype, float32_kinds: Set[str]):
        super().__init__()
        self.c = c
        self.dtype = dtype
        self.float32_mlp = "mlp" in float32_kinds
        self.norm1 = RMSNorm(c.width, c.norm_eps)
        self.norm2 = RMSNorm(c.width, c.norm_eps)
        self.gate = Linear(c.width, c.ffn, False)
        self.up = Linear(c.width, c.ffn, False)
        self.down = Linear(c.ffn, c.width, False)

    def finish(self, x: Tensor, mixed: Tensor, wanted: Tensor | None) -> Tensor:
        """Add what the mixer made of x [B, S, D], then what the MLP makes of that.

        ``mixed`` [B, S, inner width of ``o``] is still to be multiplied by ``o``. With ``wanted`` int32 [B, P], rows of
        B * S, only those positions go on, as [B, P, D].
        """
        x = rows_of(x, wanted)
        mixed = ops.watch("attention", self.o(rows_of(mixed, wanted)))
        x = ops.watch("residual", x + mixed.to(x.dtype))
        h = self.norm2(x).to(self.dtype)
        if self.float32_mlp:
            h = h.float()
        gate = ops.watch("mlp", self.gate(h))
        up = ops.watch("mlp", self.up(h))
        inner = ops.watch("mlp", F.silu(gate) * up)
        x = x + ops.watch("mlp", self.down(inner)).to(x.dtype)
        return ops.watch("residual", x)


class Layer(Block):
    """A layer with grouped-query attention over the cache; its heads may have gates."""

    def __init__(self, c: TextConfig, dtype: torch.dtype, float32_kinds: Set[str]):
        super().__init__(c, dtype, float32_kinds)
        self.q = Linear(c.width, (2 if c.gated else 1) * c.heads * c.head_dim, c.qkv_bias)
        self.o = Linear(c.heads * c.head_dim, c.width, False)
        self.k = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        own: Tensor,
        entries: Tensor,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> x, as ``finish`` returns it, and the updated caches [B, kv_heads, M, Dh]."""
        c = self.c
        B, S, _ = x.shape
        h = self.norm1(x).to(self.dtype)
        q = ops.watch("attention", self.q(h)).reshape(B, S, c.heads, -1)
        k, v = (ops.watch("attention", part(h)).reshape(B, S, -1, c.head_dim) for part in (self.k, self.v))
        gates = None
        if c.gated:
            q, gates = (q.narrow(3, first, c.head_dim) for first in (0, c.head_dim))
        q = self.turn(self.q_norm(q), cos, sin)
        k = self.turn(self.k_norm(k), cos, sin)
        out, k_cache, v_cache = ops.cached_attention(
            q, k, v, k_cache, v_cache, own, entries, c.head_dim**-0.5
        )
        if gates is not None:
            out = out * torch.sigmoid(gates)
        return self.finish(x, out.reshape(B, S, c.heads * c.head_dim), wanted), k_cache, v_cache

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions for the first values of each head. x [B, S, heads, Dh]; cos, sin [B, S, width / 2]."""
        width = self.c.rope.width
        if width == self.c.head_dim:
            return ops.rotary(x, cos, sin)
        return torch.cat(
            (ops.rotary(x.narrow(3, 0, width), cos, sin), x.narrow(3, width, x.shape[3] - width)), dim=3
        )


class Decoder(nn.Module):
    """Token ids and features of images in, logits at the wanted positions out, states updated."""

    def __init__(
        self, model: ModelConfig, dtype: torch.dtype = torch.float32, float32_kinds: Set[str] = frozenset()
    ):
        super().__init__()
        self.c = c = model.text
        self.dtype = dtype
        self.residual = torch.float32 if "residual" in float32_kinds else dtype
        self.token_table = nn.Parameter(torch.empty(c.vocab, c.width))
        self.layers = nn.ModuleList(self.layer(i, float32_kinds) for i in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.head = None if c.tied_head else nn.Parameter(torch.empty(c.vocab, c.width))
        self.register_buffer("axis_freq", torch.empty(model.axes, c.rope.width // 2))
        for name, parameter in self.named_parameters():  # the constants stay float32
            if not name.endswith(FLOAT32):
                parameter.data = parameter.data.to(dtype)

    def layer(self, index: int, float32_kinds: Set[str]) -> nn.Module:
        """A new layer."""
        return Layer(self.c, self.dtype, float32_kinds)

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        feature_rows: Tensor,
        position_ids: Tensor,
        start: Tensor,
        logits_at: Tensor,
        states: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run S more tokens of each row.

        input_ids int32 [B, S]; features [1 + L, K, D], K at least 1: embeddings and deepstack levels of images;
        feature_rows int32 [B, S]: which of the K stands at a position, -1 where a token does; position_ids int32
        [A, B, S]; start int32 [B], entries already in the cache; logits_at int32 [B, P], positions in S; states: key,
        value per layer, [B, kv_heads, M, Dh] each (TextConfig.states). Returns logits float32 [B, P, V] and the
        states in the same order.
        """
        x, new_states = self.hidden(input_ids, features, feature_rows, position_ids, start, logits_at, states)
        return self.logits(x), *new_states

    def hidden(
        self,
        input_ids: Tensor,
        features: Tensor,
        feature_rows: Tensor,
        position_ids: Tensor,
        start: Tensor,
        logits_at: Tensor,
        states: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """What ``logits`` is given, x [B, P, D], and the updated states; arguments as of ``forward``.

        A decoder of another architecture has its own of this, rather than its own ``forward``.
        """
        x = self.embed(input_ids, features, feature_rows)
        return self.attend(x, features, feature_rows, position_ids, start, logits_at, states)

    def embed(self, input_ids: Tensor, features: Tensor, feature_rows: Tensor) -> Tensor:
        """Arguments as of ``forward`` -> x [B, S, D]: embeddings of tokens, and of images where they stand."""
        tokens = F.embedding(input_ids, self.token_table)
        return torch.where((feature_rows >= 0).unsqueeze(2), _placed(features, feature_rows, 0), tokens).to(
            self.residual
        )

    def attend(
        self,
        x: Tensor,
        features: Tensor,
        feature_rows: Tensor,
        position_ids: Tensor,
        start: Tensor,
        logits_at: Tensor,
        states: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers: x [B, S, D], the others as of ``forward`` -> x [B, P, D] and the updated states.

        Nothing reads the last layer at other positions but its own attention, so what follows that (the product
        with ``o``, the MLP) is made of the wanted positions alone.
        """
        B, S, _ = x.shape
        image_gate = (feature_rows >= 0).unsqueeze(2).to(self.residual)
        first = torch.arange(B, device=x.device, dtype=torch.int32).unsqueeze(1) * S
        cos, sin = self.rotary_tables(position_ids)
        own = start.unsqueeze(1) + torch.arange(S, device=start.device, dtype=torch.int32)
        full = next(i for i, layer in enumerate(self.layers) if isinstance(layer, Layer))
        entries = torch.arange(states[2 * full].shape[2], device=start.device, dtype=torch.int32)
        new_states: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            own_states = states[2 * i : 2 * i + 2]
            wanted = first + logits_at if i + 1 == len(self.layers) else None
            if isinstance(layer, Layer):
                x, *changed = layer(x, cos, sin, *own_states, own, entries, wanted)
            else:
                x, *changed = layer(x, *own_states, wanted)
            new_states += changed
            if i + 1 < features.shape[0]:
                level = _placed(features, feature_rows, i + 1).to(self.residual)
                x = ops.watch("residual", x + rows_of(level * image_gate, wanted))
        return x, new_states

    def rotary_tables(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, S, width / 2]; frequency i turns with the axis that ``axis_freq`` gives it."""
        angles = (position_ids.unsqueeze(3).float() * self.axis_freq.unsqueeze(1).unsqueeze(1)).sum(0)
        cos = torch.cos(angles)
        sin = torch.sin(angles)
        factor = attention_factor(self.c.rope)
        if factor != 1:
            cos = cos * factor
            sin = sin * factor
        return cos.to(self.dtype), sin.to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states x [B, P, D] -> float32 logits [B, P, V]."""
        table = self.token_table if self.head is None else self.head
        rows = self.norm(x.reshape(-1, x.shape[2])).to(self.dtype)
        return F.linear(rows, table).float().reshape(x.shape[0], -1, self.c.vocab)


def rows_of(x: Tensor, wanted: Tensor | None) -> Tensor:
    """x [B, S, D] -> its rows ``wanted`` int32 [B, P] of the B * S as [B, P, D]; all of them where that is None."""
    if wanted is None:
        return x
    return x.reshape(-1, x.shape[2]).index_select(0, wanted.reshape(-1)).reshape(*wanted.shape, -1)


def _placed(features: Tensor, feature_rows: Tensor, level: int) -> Tensor:
    """One level of the features [1 + L, K, D] where they stand: [B, S, D], anything where a token does."""
    B, S = feature_rows.shape
    row = feature_rows.clamp(min=0).reshape(-1)
    return features.select(0, level).index_select(0, row).reshape(B, S, -1)


def constants(model: ModelConfig) -> dict[str, np.ndarray]:
    """Values of the decoder's buffers: ``axis_freq`` float32 [A, width / 2]."""
    return {"axis_freq": axis_frequencies(model.text.rope)}
