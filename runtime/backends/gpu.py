"""What the GPU backends share: one CUDA stream, and buffers in memory that is kept between requests.

Nothing here waits for the GPU but ``download`` and ``wait``. One lock guards the stream, so several threads may share a
pipeline; their requests take turns.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...models.dtype import BY_NAME
from . import cuda
from .session import Buffer

LOG = logging.getLogger(__name__)


class GpuBackend:
    """Buffers on the current device; see session.Backend. Raises BackendError where there is no GPU."""

    capacity: int | None = None
    max_pixels: int | None = None
    appends = True
    byte_max = True  # engines and ``plain`` graphs calculate on floats
    batches = False
    cache_multiple = (
        128  # the used part of a cache by position grows in such steps, so that shapes seldom change
    )

    def __init__(self) -> None:
        self.cuda = cuda.api()
        self.gpu = cuda.gpu_name()
        self.lock = threading.RLock()
        self.memory = cuda.Memory(self.cuda)
        self.stream = int(cuda.check(self.cuda.cudaStreamCreateWithFlags(self.cuda.cudaStreamNonBlocking)))
        self.notes: list[str] = []
        self._in_flight: list[cuda.Block] = []  # memory that copies still read
        self.captures: dict[int, Any] = {}  # executable CUDA graphs by address
        self._finalizer = weakref.finalize(self, _close, self.cuda, self.memory, self.stream, self.captures)

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """See session.Backend."""
        buffer = self.empty(shape, dtype)
        with self.lock:
            cuda.check(self.cuda.cudaMemsetAsync(buffer.pointer, 0, buffer.nbytes, self.stream))
        return buffer

    def upload(self, array: np.ndarray) -> Buffer:
        """See session.Backend."""
        array = np.ascontiguousarray(array)
        buffer = self.empty(array.shape, array.dtype.name)
        self.write(buffer, array)
        return buffer

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """See session.Backend; one copy to pinned memory, one from there, in the background."""
        array = np.ascontiguousarray(array)
        staging = self.memory.take(array.nbytes, pinned=True)
        ctypes.memmove(staging.pointer, array.ctypes.data, array.nbytes)
        with self.lock:
            self._copy(buffer.pointer, staging.pointer, array.nbytes, "HostToDevice")
            self._in_flight.append(staging)

    def download(self, buffer: Buffer) -> np.ndarray:
        """See session.Backend; bfloat16 becomes float32."""
        staging = self.memory.take(buffer.nbytes, pinned=True)
        with self.lock:
            self._copy(staging.pointer, buffer.pointer, buffer.nbytes, "DeviceToHost")
            self.wait()
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * buffer.nbytes).from_address(staging.pointer))
        if buffer.dtype == "bfloat16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(buffer.shape)
        return raw.view(BY_NAME[buffer.dtype].numpy).reshape(buffer.shape).copy()

    def copy_into(self, target: Buffer, at: int, source: Buffer, count: int | None = None) -> None:
        """See session.Backend; on the device."""
        source_pitch = source.nbytes // source.shape[0]
        row = source_pitch // source.shape[1]
        target_pitch = target.shape[1] * row
        width = source_pitch if count is None else count * row
        to = target.pointer + at * row
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        with self.lock:
            cuda.check(
                self.cuda.cudaMemcpy2DAsync(
                    to, target_pitch, source.pointer, source_pitch, width, source.shape[0], kind, self.stream
                )
            )
            self._in_flight.append(source.owner)

    def wait(self) -> None:
        """See session.Backend."""
        with self.lock:
            cuda.check(self.cuda.cudaStreamSynchronize(self.stream))
            self._in_flight.clear()

    def settle(self) -> None:
        """See session.Backend."""

    def note(self, text: str) -> None:
        """Something that a user should know: in the log now, and in the stats of a request."""
        LOG.warning(text)
        self.notes.append(text)

    def close(self) -> None:
        """Give the memory and the stream back, as the end of the backend's life does; it cannot be used afterwards."""
        self._in_flight.clear()
        self._finalizer()

    def copy(self, target: Buffer, source: Buffer) -> None:
        """target = source, of the same shape, on the device."""
        with self.lock:
            self._copy(target.pointer, source.pointer, source.nbytes, "DeviceToDevice")

    def empty(self, shape: Sequence[int], dtype: str) -> Buffer:
        """New memory with whatever it held before."""
        empty = Buffer(0, tuple(shape), dtype, None)
        block = self.memory.take(empty.nbytes)
        return Buffer(block.pointer, empty.shape, dtype, block)

    def _copy(self, to: int, source: int, nbytes: int, kind: str) -> None:
        value = getattr(self.cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
        cuda.check(self.cuda.cudaMemcpyAsync(to, source, nbytes, value, self.stream))


def _close(api: cuda.Api, memory: cuda.Memory, stream: int, captures: dict[int, Any]) -> None:
    api.cudaStreamSynchronize(stream)
    for capture in captures.values():
        api.cudaGraphExecDestroy(capture)
    memory.close()
    api.cudaStreamDestroy(stream)
