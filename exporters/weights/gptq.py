"""Four bits fitted to what a matrix is multiplied with: rounding errors of one input are made up for by the next ones.

Source of the algorithm: GPTQ (Frantar et al., 2023, arXiv:2210.17323), with the scales of a group searched when its
turn has come, weighted by how large its inputs are. The inputs come from a user's images (``collect``), the model
in float32 runs on each of them, and what is kept of inputs x [n, in] is their second moment x^T x / n [in, in], in a
file. Not for the head, which sees only what answers are made of.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...models.config import Preprocessing
from ...models.progress import Progress
from ..checkpoint import Checkpoint
from ..run_model import EagerModel, Sample
from .quantize import Quantized, fit_asymmetric, fit_symmetric, limits

DAMPING = 0.01  # of the mean second moment, added to each: what the images did not show


class Moments:
    """Second moments of the inputs of matrices, files in a directory; matrices with the same inputs share one."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._file: dict[tuple[str, str], Path] = {}  # graph and weight
        self._rows: dict[Path, int] = {}
        self._last: tuple[Tensor, Path] | None = None  # what was added, and where

    def add(self, graph: str, weight: str, x: Tensor) -> None:
        """x [..., in] is multiplied with a weight."""
        key = (graph, weight)
        if self._last is not None and self._last[0] is x:
            self._file[key] = self._last[1]
            return
        path = self._file.setdefault(key, self._directory / f"{graph}.{weight}.npy")
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        power = (rows.t() @ rows).numpy()
        if path in self._rows:
            power += np.load(path)
        np.save(path, power)
        self._rows[path] = self._rows.get(path, 0) + len(rows)
        self._last = (x, path)

    def of(self, graph: str, weight: str) -> Tensor | None:
        """Float32 [in, in], or None for a weight that was not used."""
        path = self._file.get((graph, weight))
        return None if path is None else torch.from_numpy(np.load(path)) / self._rows[path]


def collect(
    checkpoint: Checkpoint,
    pre: Preprocessing,
    samples: Sequence[Sample],
    graphs: Collection[str],
    directory: Path,
    progress: Progress,
) -> Moments:
    """Run the checkpoint on the samples; moments of the inputs of ``graphs``, kept in ``directory``."""
    moments = Moments(directory)

    def on_input(graph: str, weight: str, x: Tensor) -> None:
        if graph in graphs:
            moments.add(graph, weight, x)

    model = EagerModel(checkpoint, pre, "calibrate", on_input=on_input)
    for i, sample in enumerate(samples):
        progress("calibrate", i, len(samples))
        asked = model.asked(sample)
        if "language" in graphs:
            model.decode(asked)
    progress("calibrate", len(samples), len(samples))
    return moments


def quantize_calibrated(
    matrix: Tensor,
    bits: int,
    size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    signed: bool,
    moments: Tensor,
) -> Quantized:
    """As quantize.quantize, with moments [in, in] of the inputs."""
    left = matrix.float().clone()  # what is still to be rounded, with the errors that came before
    inner, outer = left.shape
    importance = moments.diagonal() + DAMPING * moments.diagonal().mean() + 1e-12
    spread = _spread(moments)
    values = torch.empty_like(left)
    scales = torch.empty(inner // size, outer)
    zeros = torch.zeros(inner // size, outer)
    low, high = limits(bits, symmetric)
    for group, at in enumerate(range(0, inner, size)):
        rows = left[at : at + size]
        weight = importance[None, at : at + size, None]
        if symmetric:
            _, scale, zero = fit_symmetric(rows[None], bits, scale_dtype, signed, weight)
        else:
            _, scale, zero = fit_asymmetric(rows[None], bits, scale_dtype, weight)
        scales[group], zeros[group] = scale[0, 0], zero[0, 0]
        errors = torch.empty_like(rows)
        for i in range(size):
            q = ((rows[i] / scales[group]).round_() + zeros[group]).clamp_(low, high)
            values[at + i] = q
            errors[i] = (rows[i] - (q - zeros[group]) * scales[group]) / spread[at + i, at + i]
            rows[i + 1 :].addr_(spread[at + i, at + i + 1 : at + size], errors[i], alpha=-1)
        left[at + size :].addmm_(spread[at : at + size, at + size :].t(), errors, alpha=-1)
    kind = np.int8 if symmetric else np.uint8
    return Quantized(
        values.numpy().astype(kind), scales.numpy(), None if symmetric else zeros.numpy().astype(np.uint8)
    )


def _spread(moments: Tensor) -> Tensor:
    """How an error of one input is spread over those after it: upper triangular U with U^T U = moments^-1.

    Moments are R R^T with R upper triangular (Cholesky from the last input backwards), so U is R^-1.
    """
    wide = moments.double()
    wide.diagonal().add_(DAMPING * wide.diagonal().mean() + 1e-12)
    lower = torch.linalg.cholesky(wide.flip(0, 1))
    identity = torch.eye(len(wide), dtype=torch.float64)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
