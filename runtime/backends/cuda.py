"""The few CUDA runtime calls that the GPU backends need, through cuda-python: errors become exceptions."""

from __future__ import annotations

import threading
from collections import defaultdict
from types import ModuleType
from typing import Any

from ...models.errors import BackendError

INSTALL = "install cuda-python for the CUDA of this machine: pip install 'cuda-python>=12.6,<14'"

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
HINTS = {
    "MemoryAllocation": "free GPU memory or build with smaller profiles",
    "InsufficientDriver": "found no NVIDIA driver, or one that is older than the CUDA of cuda-python; install a "
    "driver, or the cuda-python of the driver's CUDA (JetPack 6: pip install 'cuda-python==12.6.*')",
    "NoDevice": "expected an NVIDIA GPU",
}


class Api:
    """A module of cuda-python whose functions raise BackendError where it could not load its libraries."""

    def __init__(self, module: ModuleType):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if isinstance(value, type) or not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            try:
                return value(*arguments)
            except RuntimeError as err:  # cuda-python 12 does so; 13 returns an error code
                raise BackendError(f"CUDA failed: {err}; {HINTS['InsufficientDriver']}") from err

        return call


def api() -> Api:
    """``cuda.bindings.runtime``. Raises BackendError that says what to install."""
    try:
        from cuda.bindings import runtime
    except ImportError as err:
        raise BackendError(
            f"cuda.bindings cannot be imported ({err}), expected for a GPU; {INSTALL}"
        ) from err
    return Api(runtime)


def check(result: tuple[Any, ...]) -> Any:
    """The value (or values) of a CUDA call; raises BackendError with CUDA's words if it failed."""
    error, *values = result
    if int(error) != 0:
        name = getattr(error, "name", str(error))
        hint = next((f"; {todo}" for part, todo in HINTS.items() if part in name), "")
        raise BackendError(f"CUDA failed with {name}{hint}")
    return values[0] if len(values) == 1 else tuple(values)


def compute_capability(device: int = 0) -> str:
    """ "8.9" for an RTX 4090. Raises BackendError where there is no GPU."""
    cuda = api()
    names = cuda.cudaDeviceAttr
    kinds = (names.cudaDevAttrComputeCapabilityMajor, names.cudaDevAttrComputeCapabilityMinor)
    return ".".join(str(check(cuda.cudaDeviceGetAttribute(kind, device))) for kind in kinds)


def gpu_name(device: int = 0) -> str:
    """ "NVIDIA GeForce RTX 4090", or "Orin". Raises BackendError where there is no GPU."""
    name = check(api().cudaGetDeviceProperties(device)).name
    return name.decode() if isinstance(name, bytes) else str(name)


class Memory:
    """Device and pinned host memory that is kept for the next request instead of being given back to CUDA.

    Sizes are rounded up to powers of two, so that blocks fit again, and over 64 MB (caches, activations: the same sizes
    every time) to whole megabytes.
    """

    def __init__(self, cuda: Api):
        self.cuda = cuda
        self.lock = threading.RLock()  # a block may be collected while the lock is held
        self.free: dict[tuple[bool, int], list[int]] = defaultdict(list)
        self.total = 0  # bytes taken from CUDA on the device
        self.closed = False

    def take(self, nbytes: int, pinned: bool = False) -> Block:
        """A block of at least ``nbytes``, with whatever it held before.

        Where CUDA has no more, the free blocks go back to it first. Raises BackendError that says what was asked for,
        what is free and what to lower.
        """
        size = rounded(nbytes)
        with self.lock:
            kept = self.free[pinned, size]
            pointer = kept.pop() if kept else None
        if pointer is None:
            pointer = self._allocated(size, pinned)
            self.total += 0 if pinned else size
        return Block(self, pointer, size, pinned)

    def _allocated(self, size: int, pinned: bool) -> int:
        call = self.cuda.cudaMallocHost if pinned else self.cuda.cudaMalloc
        error, *pointer = call(size)
        if int(error) == OUT_OF_MEMORY:
            self.release_free()
            error, *pointer = call(size)
        if int(error) == OUT_OF_MEMORY:
            free, whole = check(self.cuda.cudaMemGetInfo())
            kind = "pinned memory of the host" if pinned else "memory of the GPU"
            raise BackendError(
                f"asked for {size / 1e6:.0f} MB of {kind}, found {free / 1e6:.0f} MB free of the GPU's "
                f"{whole / 1e6:.0f}, {self.total / 1e6:.0f} of which are in use here; lower --slots, --context or "
                "--reuse, build with a smaller --capacity or --max-pixels, or free memory that others hold"
            )
        return int(check((error, *pointer)))

    def give_back(self, pinned: bool, size: int, pointer: int, outgrown: bool = False) -> None:
        """Keep a block for the next ``take``, or free it if this was closed or no such size will be asked for."""
        with self.lock:
            if not self.closed and not outgrown:
                self.free[pinned, size].append(pointer)
                return
        self._release(pinned, size, pointer)

    def release_free(self) -> None:
        """Give all free blocks back to CUDA."""
        with self.lock:
            for (pinned, size), pointers in self.free.items():
                for pointer in pointers:
                    self._release(pinned, size, pointer)
                pointers.clear()

    def close(self) -> None:
        """Give all free blocks back to CUDA, and from now on the others as soon as nobody refers to them."""
        with self.lock:
            self.closed = True
            self.release_free()

    def _release(self, pinned: bool, size: int, pointer: int) -> None:
        check((self.cuda.cudaFreeHost if pinned else self.cuda.cudaFree)(pointer))
        self.total -= 0 if pinned else size


def rounded(nbytes: int) -> int:
    """The size of the block that holds ``nbytes``."""
    return -(-nbytes >> 20 << 20) if nbytes > 64 << 20 else max(512, 1 << max(0, nbytes - 1).bit_length())


class Block:
    """Memory that goes back to its ``Memory`` when nobody refers to it any more."""

    def __init__(self, memory: Memory, pointer: int, size: int, pinned: bool):
        self.memory = memory
        self.pointer = pointer
        self.size = size
        self.pinned = pinned
        self.outgrown = False  # a larger one takes its place for good

    def __del__(self) -> None:
        self.memory.give_back(self.pinned, self.size, self.pointer, self.outgrown)
