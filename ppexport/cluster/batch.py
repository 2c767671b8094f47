"""``ppexport batch --ray``: the lines of a file, answered by copies of a bundle with Ray Data."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batch import Numbered, Work, Written
from ..models.errors import BackendError
from ..runtime.bundle import open_bundle
from .connect import Cluster, Fitted, connected, fitted

if TYPE_CHECKING:
    import pyarrow as pa

ROUNDS = 4  # lines for each slot of a copy at a time: what is answered again if the copy dies
RETRIES = 3  # of lines whose copy died


class Copy:
    """A bundle that answers blocks of lines, in a process of Ray's."""

    def __init__(self, work: Work, threads: int):
        self.work = work
        self.pipe = work.open(threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Columns number int64 and line binary -> failed bool and line binary, what is written of each."""
        import pyarrow as pa

        lines = zip(block["number"].to_pylist(), block["line"].to_pylist(), strict=True)
        found = list(self.work.answer(self.pipe, lines))
        return pa.table(
            {
                "failed": pa.array([each.failed for each in found], pa.bool_()),
                "line": pa.array([each.line for each in found], pa.large_binary()),
            }
        )


@contextmanager
def answering(work: Work, cluster: Cluster) -> Iterator[Callable[[Iterator[Numbered]], Iterator[Written]]]:
    """What answers lines on a cluster, in their order, as long as the block runs.

    A copy that dies is started again, and what it had not handed over is answered again; the bundle is at the same path
    on every node. Raises BackendError, BundleError, RequestError.
    """
    work = replace(work, bundle=str(Path(work.bundle).resolve()))
    open_bundle(work.bundle)
    with connected(cluster):
        copies = fitted(cluster, work.bundle, work.device)
        yield lambda lines: _answer(work, copies, lines)


def _answer(work: Work, copies: Fitted, lines: Iterator[Numbered]) -> Iterator[Written]:
    import ray
    from ray.data import DataContext

    blocks: list[Any] = [ray.put(block) for block in _blocks(lines, ROUNDS * work.slots)]
    if not blocks:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    most = min(copies.most, len(blocks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing else sets retries, and Ray is to drop it in 2.64
        data = ray.data.from_arrow_refs(blocks).map_batches(
            Copy,
            fn_constructor_args=(work, copies.threads),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=min(copies.least, most), max_size=most),
            num_cpus=copies.cpus,
            num_gpus=copies.gpus,
            ray_remote_args_fn=lambda: {"max_task_retries": RETRIES},
        )
    try:
        block: Any
        for block in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            columns = (block[name].to_pylist() for name in ("failed", "line"))
            yield from map(Written, *columns)
    except ray.exceptions.RayError as err:
        last = [line for line in str(err).splitlines() if line.strip()][-1]
        raise BackendError(f"the Ray cluster could not answer: {last.strip()}; the next run goes on") from err


def _blocks(lines: Iterator[Numbered], size: int) -> Iterator[pa.Table]:
    """So many lines at a time: columns number int64 and line binary."""
    import pyarrow as pa

    while block := list(itertools.islice(lines, size)):
        numbers, texts = zip(*block, strict=True)
        yield pa.table({"number": pa.array(numbers, pa.int64()), "line": pa.array(texts, pa.large_binary())})
