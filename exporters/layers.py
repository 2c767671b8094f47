"""Layers both towers share. Weights are stored the way a matrix product reads them: [in, out]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """x [..., in] @ weight [in, out] (+ bias [out])."""

    def __init__(self, inner: int, outer: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, outer))
        self.bias = nn.Parameter(torch.empty(outer)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class LayerNorm(nn.Module):
    """Layer norm over the last axis with weight and bias [width]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> like x."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
