"""The contract between the stages and a backend: buffers in the backend's memory, and graphs that read and write them.

A stage allocates its outputs itself (their shapes are always known beforehand) and binds pointers, so a value that one
graph writes and the next one reads is never copied and never becomes a Python object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...models.dtype import BY_NAME


@dataclass(frozen=True)
class Buffer:
    """A contiguous tensor in a backend's memory."""

    pointer: int  # address in the backend's memory
    shape: tuple[int, ...]
    dtype: str  # a key of dtype.BY_NAME
    owner: Any  # keeps the memory alive

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        total = BY_NAME[self.dtype].nbytes
        for n in self.shape:
            total *= n
        return total

    def rows(self, start: int, stop: int) -> Buffer:
        """The entries ``start`` ... ``stop - 1`` of the first axis, as a view."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}..{stop} of a buffer with {self.shape[0]}")
        stride = self.nbytes // self.shape[0] if self.shape[0] else 0
        return Buffer(self.pointer + start * stride, (stop - start, *self.shape[1:]), self.dtype, self.owner)

    def reshape(self, *shape: int) -> Buffer:
        """The same memory under another shape of the same size."""
        view = Buffer(self.pointer, shape, self.dtype, self.owner)
        if view.nbytes != self.nbytes:
            raise ValueError(f"cannot view {self.shape} as {shape}")
        return view


class Binding(Protocol):
    """One caller's set of inputs and outputs of a graph. Bindings of one session may run on several threads."""

    def input(self, name: str, buffer: Buffer) -> None:
        """Read the graph input ``name`` from ``buffer`` from now on."""

    def output(self, name: str, buffer: Buffer) -> None:
        """Write the graph output ``name`` to ``buffer`` from now on."""

    def run(self) -> None:
        """Run the graph once. Whatever reads its outputs through the backend finds them there."""


class Session(Protocol):
    """A loaded graph."""

    inputs: Sequence[str]
    outputs: Sequence[str]

    def binding(self) -> Binding:
        """A new, empty binding."""


class Backend(Protocol):
    """Where graphs run and buffers live."""

    name: str
    device: str  # as ppexport.load takes it
    gpu: str  # its name; empty on a CPU
    capacity: int | None  # tokens that a cache holds, where that is fixed
    max_pixels: int | None  # of images, where there is a limit
    cache_multiple: int  # a cache by position is read in multiples of so many entries
    batches: bool  # may a run of the decoder hold several sequences?
    byte_max: bool  # does it have Max and Min on bytes? (models.pruners.pixelprune.prune_file)
    appends: bool  # may the rest of a prompt, of any length, be run behind what a cache holds?
    notes: list[str]  # what a user should know of how graphs run; whoever tells it takes it out

    def session(self, path: Path) -> Session:
        """Load an ONNX graph with the weights beside it."""

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """New memory, all bytes zero."""

    def upload(self, array: np.ndarray) -> Buffer:
        """A host array in the backend's memory; where that is host memory, the array itself."""

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Put a host array of the same shape and dtype into a buffer."""

    def download(self, buffer: Buffer) -> np.ndarray:
        """A buffer as a host array; where that is host memory, a view of it. bfloat16 becomes float32."""

    def copy_into(self, target: Buffer, at: int, source: Buffer, count: int | None = None) -> None:
        """target[:, at : at + count] = source[:, :count], for a source [A, n, ...] and a target [A, m, ...].

        ``count``: None for all n; m >= at + count.
        """

    def settle(self) -> None:
        """Take the memory that all graphs share: every graph that requests need for certain is loaded.

        Raises BackendError where there is too little of it.
        """

    def wait(self) -> None:
        """Return when everything that was started is done, so that times can be measured."""

    def close(self) -> None:
        """Give back what the backend holds on its device, sooner than its end of life would."""


def run(session: Session, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
    """Bind everything and run once."""
    binding = session.binding()
    for name, buffer in inputs.items():
        binding.input(name, buffer)
    for name, buffer in outputs.items():
        binding.output(name, buffer)
    binding.run()
