"""Selection from the resized uint8 image to the kept indices, side by side with the authors' reference.

    python bench/selector.py -o bench/results/selector.json \\
        [--reference PATH_OF_PIXELPRUNE --reference-python PYTHON_WITH_TRANSFORMERS_4.57.6]

Ours: one run of the packaged ONNX graph on ONNX Runtime CPU, the indices read back. The reference: its processor's
rescale, normalise and patchify, then its selector, in a process of its own. The two take turns, image by image, in one
run; the indices are compared. Also measured: how fast this machine copies memory, for the distance to the floor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

import ppexport
from ppexport.runtime.image import prepare
from ppexport.runtime.prune import packaged_selector

IMAGES = Path(__file__).parent.parent / "tests" / "golden" / "images"


class Reference:
    """The reference in a process of its own."""

    def __init__(self, python: Path, path: Path):
        worker = Path(__file__).parent / "reference_selector.py"
        self.process = subprocess.Popen(
            [python, worker, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def select(self, pixels: Path, tau: float) -> tuple[float, list[int]]:
        """(milliseconds, kept indices)."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"pixels": str(pixels), "tau": tau}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["ms"], answer["keep"]


def ours(pixels: np.ndarray, prune: ppexport.Prune) -> tuple[float, list[int]]:
    selector = packaged_selector(32)
    begin = time.perf_counter()
    _, selection = selector.select(selector.backend.upload(pixels), prune)
    return (time.perf_counter() - begin) * 1e3, selection.keep.tolist()


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy, GB/s."""
    source = np.ones(256 << 20, np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return 2 * source.nbytes / median(times[2:]) / 1e9


def summary(times: list[float]) -> dict[str, float]:
    return {"n": len(times), "median_ms": round(median(times), 3), "p90_ms": round(quantiles(times, n=10)[-1], 3)}


@click.command()
@click.option("--reference", type=click.Path(exists=True, path_type=Path), help="A checkout of PixelPrune.")
@click.option("--reference-python", type=click.Path(exists=True, path_type=Path))
@click.option("--tau", "taus", type=float, multiple=True, default=(0.0, 0.05), show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(
    reference: Path | None,
    reference_python: Path | None,
    taus: tuple[float, ...],
    repeats: int,
    output: Path | None,
    images: tuple[Path, ...],
) -> None:
    worker = Reference(reference_python or Path(sys.executable), reference) if reference else None
    bandwidth = copy_bandwidth()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for path in images or sorted(IMAGES.iterdir()):
            pixels = prepare(path, 32, 65536, 16777216)
            file = Path(name) / f"{path.stem}.npy"
            np.save(file, pixels)
            for tau in taus:
                prune = ppexport.Prune(tau=tau, anchored=False)
                mine, theirs = [], []
                for i in range(repeats + 2):
                    ms, keep = ours(pixels, prune)
                    mine += [ms] if i >= 2 else []
                    if worker:
                        ms, expected = worker.select(file, tau)
                        theirs += [ms] if i >= 2 else []
                        if keep != expected:
                            raise SystemExit(f"{path.name}, tau {tau}: {len(keep)} kept, reference {len(expected)}")
                row = {"image": path.name, "size": [pixels.shape[1], pixels.shape[0]], "tau": tau, "mode": "sliding"}
                row |= {"kept": len(keep), "tokens": pixels.size // 3072, "ours": summary(mine)}
                row["floor_ms"] = round(2 * pixels.nbytes / bandwidth / 1e6, 3)
                if worker:
                    row |= {"reference": summary(theirs), "speedup": round(median(theirs) / median(mine), 1)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    result = {"what": "selection, resized uint8 image to kept indices", "machine": describe()}
    result |= {"copy_gb_per_s": round(bandwidth, 1), "rows": rows}
    if worker:
        for tau in taus:
            speedup = median(r["speedup"] for r in rows if r["tau"] == tau)
            result[f"median_speedup_tau_{tau}"] = speedup
            print(f"tau {tau}: median speedup {speedup}")
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
