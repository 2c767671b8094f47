"""A decoder some of whose layers are linear attention by the gated delta rule: what they remember has one size.

Source of the architecture: transformers ``models/qwen3_5``; Yang et al. 2024, arXiv:2412.06464.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.config import TextConfig
from ..layers import Linear, RMSNorm
from ..lowering import ops
from . import attention
from .attention import constants

__all__ = ["Decoder", "constants"]
NORM_EPS = 1e-6  # of the lengths of queries and keys


class DeltaLayer(attention.Block):
    """A layer of linear attention: a short convolution over queries, keys and values, then the gated delta rule."""

    def __init__(self, c: TextConfig, dtype: torch.dtype, float32_kinds: Set[str]):
        super().__init__(c, dtype, float32_kinds)
        assert c.delta is not None
        d = self.d = c.delta
        values = d.value_heads * d.value_dim
        self.qkv = Linear(c.width, d.channels, False)
        self.z = Linear(c.width, values, False)
        self.b = Linear(c.width, d.value_heads, False)
        self.a = Linear(c.width, d.value_heads, False)
        self.conv = nn.Parameter(torch.empty(d.channels, 1, d.kernel))
        self.dt_bias = nn.Parameter(torch.empty(d.value_heads))
        self.log_decay = nn.Parameter(torch.empty(d.value_heads))
        self.gated_norm = RMSNorm(d.value_dim, c.norm_eps)
        self.o = Linear(values, c.width, False)

    def forward(
        self, x: Tensor, conv: Tensor, recurrent: Tensor, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> x, as ``finish`` returns it, and the states.

        conv [B, kernel - 1, channels], recurrent [B, Hv, dk, dv].
        """
        d = self.d
        B, S, _ = x.shape
        h = self.norm1(x).to(self.dtype)
        mixed, conv = ops.causal_convolution(ops.watch("attention", self.qkv(h)), self.conv, conv)
        keys = d.key_heads * d.key_dim
        q, k = (
            _unit(mixed.narrow(2, first, keys).reshape(B, S, d.key_heads, d.key_dim).float())
            for first in (0, keys)
        )
        v = mixed.narrow(2, 2 * keys, d.value_heads * d.value_dim)
        v = v.reshape(B, S, d.value_heads, d.value_dim).float()
        decay = -torch.exp(self.log_decay.float()) * F.softplus(self.a(h).float() + self.dt_bias.float())
        beta = torch.sigmoid(self.b(h).float())
        out, recurrent = ops.delta_rule(q, k, v, decay, beta, recurrent)
        gates = F.silu(self.z(h).reshape(B, S, d.value_heads, d.value_dim).float())
        out = (self.gated_norm(out) * gates).to(self.dtype)
        return self.finish(x, out.reshape(B, S, d.value_heads * d.value_dim), wanted), conv, recurrent


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


class Decoder(attention.Decoder):
    """Layers of both kinds, as the configuration says."""

    def layer(self, index: int, float32_kinds: Set[str]) -> nn.Module:
        """A new layer."""
        assert self.c.delta is not None
        kind = DeltaLayer if index in self.c.delta.layers else attention.Layer
        return kind(self.c, self.dtype, float32_kinds)
