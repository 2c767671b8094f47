"""The kernels that TensorRT-RTX compiles for the GPU at hand when engines are loaded, kept for the next process."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from ...models.files import write_whole
from . import cuda

LOG = logging.getLogger(__name__)


class KernelCache:
    """A runtime cache beside the engines of a bundle, for one GPU and CUDA of its driver: kernels-<GPU>-<CUDA>.cache.

    A file that does not fit, torn or of another release, is left out and replaced. One that cannot be written is told
    in the log: engines run without it, only loading takes longer. Source: IRuntimeCache of the TensorRT-RTX API.
    """

    def __init__(self, folder: Path):
        driver = cuda.check(cuda.api().cudaDriverGetVersion())
        gpu = re.sub(r"\W+", "-", cuda.gpu_name()).strip("-")
        self.path = folder / f"kernels-{gpu}-{driver}.cache"
        self.cache: Any = None
        self.kept = b""  # what the file holds

    def attach(self, config: Any) -> None:
        """Let contexts that are made with an IRuntimeConfig take kernels from the cache and put theirs there."""
        if self.cache is None:
            self.cache = config.create_runtime_cache()
            try:
                kept = self.path.read_bytes() if self.path.is_file() else b""
            except OSError as err:
                LOG.warning("%s: cannot be read: %s", self.path, err)
                kept = b""
            if kept and self.cache.deserialize(kept):
                self.kept = kept
            elif kept:
                LOG.warning("%s: is not of this GPU, driver and TensorRT-RTX; it is made anew", self.path)
        config.set_runtime_cache(self.cache)

    def keep(self) -> None:
        """Write the file if there is anything new."""
        found = self.cache.serialize() if self.cache is not None else None
        data = bytes(memoryview(found)) if found is not None else b""
        if not data or data == self.kept:
            return
        try:
            write_whole(self.path, lambda partial: partial.write_bytes(data))
            self.kept = data
        except OSError as err:
            LOG.warning("%s: kernels cannot be kept: %s; they are compiled again next time", self.path, err)
