"""Tokens per second of requests that run together: 1, 2, 4 and 8 at once, in turns, each with what it gives alone.

    python bench/concurrency.py --checkpoint CHECKPOINT --precisions int4,w8a8 -o bench/results/concurrency_300m.json

Prompts of 17 to 512 tokens (without images: those are not decoded), 64 tokens each. Counted is the time in which all of
them decode. ``--any-cpu`` times w8a8 on CPUs without VNNI, too, where sums may saturate: right speeds, wrong words.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import ppexport
from ppexport.bench import machine
from ppexport.models.precision import Wanted
from ppexport.runtime.backends import devices
from ppexport.runtime.sequence import Sequence

LENGTHS = (17, 512, 64, 300, 128, 33, 450, 200)
TOKENS = 64
AT_ONCE = (1, 2, 4, 8)


def start(pipe: ppexport.Pipeline, count: int) -> list[Sequence]:
    vocab = pipe.manifest.model.text.vocab
    sequences = []
    for i in range(count):
        ids = np.random.default_rng(i).integers(0, vocab - 1, LENGTHS[i])
        ids[ids == pipe.manifest.model.image_token] = 1
        sequences.append(
            pipe.prepare_tokens(ids, max_new_tokens=TOKENS, stop=(), ahead=None, keeps_logits=False)
        )
        pipe.engine.add(sequences[-1])
    return sequences


def once(pipe: ppexport.Pipeline, count: int) -> tuple[float, list[list[int]]]:
    """Tokens per second while all decode, and the tokens of each."""
    sequences = start(pipe, count)
    while not all(sequence.decodes for sequence in sequences):
        pipe.engine.step()
    generated = sum(sequence.stats.generated_tokens for sequence in sequences)
    begin = time.perf_counter()
    while not any(sequence.finished for sequence in sequences):
        pipe.engine.step()
    seconds = time.perf_counter() - begin
    made = sum(sequence.stats.generated_tokens for sequence in sequences) - generated
    while not all(sequence.finished for sequence in sequences):
        pipe.engine.step()
    return made / seconds, [[step.token for step in sequence.pending] for sequence in sequences]


def measure(bundle: Path, rounds: int) -> dict[str, Any]:
    with ppexport.load(bundle, "cpu", reuse=0, together=max(AT_ONCE)) as pipe:
        alone = []
        for i in range(max(AT_ONCE)):
            sequences = start(pipe, i + 1)
            for other in sequences[:-1]:
                pipe.engine.cancel(other)
            while not sequences[-1].finished:
                pipe.engine.step()
            alone.append([step.token for step in sequences[-1].pending])
        speeds: dict[int, list[float]] = {count: [] for count in AT_ONCE}
        same = dict.fromkeys(AT_ONCE, 1.0)
        for _ in range(rounds):
            for count in AT_ONCE:
                speed, tokens = once(pipe, count)
                speeds[count].append(speed)
                equal = [
                    a == b for x, y in zip(tokens, alone, strict=False) for a, b in zip(x, y, strict=True)
                ]
                same[count] = min(same[count], sum(equal) / len(equal))
    return {
        str(count): {
            "tokens_per_second": round(statistics.median(values), 1),
            "all": [round(value, 1) for value in values],
            "tokens_as_alone": round(same[count], 4),
        }
        for count, values in speeds.items()
    }


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True)
@click.option("--precisions", default="int4,w8a8", show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--any-cpu", is_flag=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(checkpoint: Path, precisions: str, rounds: int, any_cpu: bool, output: Path) -> None:
    saturates = devices.saturates()
    if any_cpu:
        devices.saturates = lambda: False
    results = {}
    for precision in precisions.split(","):
        with tempfile.TemporaryDirectory() as work:
            wanted = Wanted(precision, vision="int8" if precision != "w8a8" else None)
            bundle = ppexport.build(checkpoint, Path(work) / "bundle", wanted)
            results[precision] = measure(bundle, rounds)
        for count, found in results[precision].items():
            print(
                precision,
                count,
                found["tokens_per_second"],
                f"{found['tokens_as_alone']:.1%} as alone",
                flush=True,
            )
    given = {
        "machine": machine.describe().model_dump(),
        "vnni": not saturates,
        "prompts": LENGTHS,
        "tokens": TOKENS,
        "results": results,
    }
    output.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
