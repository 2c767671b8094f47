"""Buffers in the host's memory, which numpy owns: what backends on a CPU share, so that their graphs can be mixed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...models.dtype import BY_NAME
from .session import Buffer


class HostMemory:
    """The part of session.Backend that has to do with memory."""

    gpu = ""
    capacity: int | None = None
    max_pixels: int | None = None
    cache_multiple = 1
    appends = True

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """See session.Backend; pages are taken from the system when they are first written."""
        return self.upload(np.zeros(shape, BY_NAME[dtype].numpy))

    def upload(self, array: np.ndarray) -> Buffer:
        """See session.Backend."""
        array = np.ascontiguousarray(array)
        return Buffer(array.ctypes.data, array.shape, array.dtype.name, array)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """See session.Backend."""
        self.download(buffer)[...] = array

    def download(self, buffer: Buffer) -> np.ndarray:
        """See session.Backend."""
        memory = buffer.owner.reshape(-1).view(np.uint8)
        start = buffer.pointer - buffer.owner.ctypes.data
        return memory[start : start + buffer.nbytes].view(BY_NAME[buffer.dtype].numpy).reshape(buffer.shape)

    def copy_into(self, target: Buffer, at: int, source: Buffer, count: int | None = None) -> None:
        """See session.Backend."""
        count = source.shape[1] if count is None else count
        self.download(target)[:, at : at + count] = self.download(source)[:, :count]

    def settle(self) -> None:
        """See session.Backend."""

    def wait(self) -> None:
        """See session.Backend; a run returns when it is done."""

    def close(self) -> None:
        """See session.Backend; there is nothing that Python does not give back."""
