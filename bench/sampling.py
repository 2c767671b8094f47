"""Drawing a token at the vocabulary of Qwen3-VL, beside a full stable sort that draws the same ones.

    python bench/sampling.py -o bench/results/sampling.json

Memory is kept by the C library as it is after a bundle was loaded (runtime/backends/ort.py): otherwise each array, of
over a megabyte, is taken from the system anew, for either way.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
from machine import describe
from test_sampling import by_full_sort

from ppexport.runtime.backends.ort import OrtCpu
from ppexport.runtime.sampling import Sampling
from ppexport.runtime.selector import packaged_selector

VOCABULARY = 151936
SETTINGS = [{}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}]


@click.command()
@click.option("--runs", default=60, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(runs: int, output: Path) -> None:
    packaged_selector(32)  # loads a graph
    logits = np.random.default_rng(0).normal(0, 3, VOCABULARY).astype(np.float32)
    rows = []
    for given in SETTINGS:
        sampling = Sampling(0.7, **given)
        times: dict[str, list[float]] = {"ours": [], "full_sort": []}
        ours, theirs = sampling.rng(), sampling.rng()
        for _ in range(runs):
            begin = time.perf_counter()
            token = sampling.choose(logits, ours)
            middle = time.perf_counter()
            assert token == by_full_sort(sampling, logits, theirs)
            times["ours"].append((middle - begin) * 1e3)
            times["full_sort"].append((time.perf_counter() - middle) * 1e3)
        rows.append({"setting": given, **{name: round(median(ms), 3) for name, ms in times.items()}})
        print(rows[-1])
    found = {
        "machine": describe(),
        "backend": OrtCpu.name,
        "vocabulary": VOCABULARY,
        "runs": runs,
        "medians_ms": rows,
    }
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
