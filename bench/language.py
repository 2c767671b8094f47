"""The decoder alone on the CPU: prefill and decode, against how fast this machine reads memory.

    python bench/language.py --shape 2b -o bench/results/language_2b.json

Makes a random checkpoint of that shape (or takes --checkpoint) and builds it in each precision. "gb_per_token" is what
a token has to read: all weights of the decoder but the token table, and the cache; at the memory's speed
("memory_gb_per_s", squaring a large array on as many threads, before each run and after the last; the median, as for
decode) that is the limit. A bundle runs in a process of its own, one after the other, since they are large.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import build, random_checkpoint
from machine import describe
from workers import ours

PROMPT = 256
TOKENS = 65


def memory_speed(threads: int, size: int = 1 << 30) -> list[float]:
    """Bytes per second that ``threads`` threads read together, several times, each the best of three."""
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:

        def once() -> float:
            begin = time.perf_counter()
            list(pool.map(np.dot, parts, parts))
            return time.perf_counter() - begin

        once()
        return [size / min(once() for _ in range(3)) for _ in range(3)]


def bytes_per_token(bundle: Path, tokens: float) -> int:
    """Weights that a step reads, and the cache of so many tokens."""
    model = onnx.load(bundle / "language.onnx", load_external_data=False)
    looked_up = {name for node in model.graph.node if node.op_type == "Gather" for name in node.input[:1]}
    other = {name for node in model.graph.node if node.op_type != "Gather" for name in node.input}
    total = 0
    for tensor in model.graph.initializer:
        if tensor.name in other or tensor.name not in looked_up:
            length = next(
                (int(e.value) for e in tensor.external_data if e.key == "length"), len(tensor.raw_data)
            )
            total += length
    text = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["model"]["text"]
    return total + int(2 * text["layers"] * text["kv_heads"] * text["head_dim"] * 4 * tokens)


def measure(bundle: Path, threads: int, runs: int) -> dict[str, Any]:
    """Medians of one bundle, and of the memory's speed meanwhile."""
    worker, ids = ours(bundle, threads), list(range(1, PROMPT + 1))
    answers, speeds = [], []
    for i in range(1 + runs):
        speeds += memory_speed(threads)
        found = worker.ask(image=None, prune=False, ids=ids, tokens=TOKENS)
        answers += [found] if i else []
    speeds += memory_speed(threads)
    worker.close()
    speed = median(speeds)
    decode = median(ms for answer in answers for ms in answer["decode"])
    read, size = bytes_per_token(bundle, PROMPT + TOKENS / 2), sum(f.stat().st_size for f in bundle.iterdir())
    peak = max(answer["rss"] for answer in answers)
    return {
        "prefill_ms": round(median(answer["stages"]["prefill"] for answer in answers), 1),
        "decode_ms": round(decode, 2),
        "tokens_per_s": round(1e3 / decode, 1),
        "outside_onnxruntime_ms": round(median(ms for answer in answers for ms in answer["outside"]), 3),
        "gb_per_token": round(read / 1e9, 3),
        "gb_per_s": round(read / decode / 1e6, 1),
        "memory_gb_per_s": round(speed / 1e9, 1),
        "share_of_limit": round(read / decode * 1e3 / speed, 3),
        "bundle_gb": round(size / 1e9, 3),
        "peak_rss_gb": round(peak / 1e9, 3),
        "peak_rss_over_bundle": round(peak / size, 2),
    }


@click.command()
@click.option("--shape", default="2b", show_default=True, type=click.Choice(["tiny", "300m", "2b"]))
@click.option(
    "--checkpoint", type=click.Path(exists=True, path_type=Path), help="An existing checkpoint instead."
)
@click.option("--precisions", default="int4,w8a8", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    shape: str, checkpoint: Path | None, precisions: str, threads: int, runs: int, output: Path | None
) -> None:
    results = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if checkpoint is None:
            checkpoint = random_checkpoint(shape, work)
        for precision in precisions.split(","):
            results[precision] = measure(build(checkpoint, work, precision), threads, runs)
    result = {
        "what": f"decoder on the CPU: a prompt of {PROMPT} tokens, {TOKENS - 1} more",
        "shape": shape,
        "threads": threads,
        "machine": describe(),
        "results": results,
    }
    print(json.dumps(results, indent=1))
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
