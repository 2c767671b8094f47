"""Layers both towers share. Weights are stored the way a matrix product reads them: [in, out]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lowering import ops


class Linear(nn.Module):
    """x [..., in] @ weight [in, out] (+ bias [out])."""

    def __init__(self, inner: int, outer: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, outer))
        self.bias = nn.Parameter(torch.empty(outer)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; x in float32 makes it a product in float32."""
        y = x @ self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with weight and bias [width]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> like x."""
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis with weight [width], computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> like x."""
        return ops.rms_norm(x, self.weight.to(x.dtype), self.eps)


NORMS: dict[str, type[LayerNorm | RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}  # by VisionConfig.norm
