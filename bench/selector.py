"""Selection from the resized uint8 image to the kept indices, side by side with the authors' reference.

    python bench/selector.py -o bench/results/selector.json \\
        [--reference PATH_OF_PIXELPRUNE --reference-python PYTHON_WITH_TRANSFORMERS_4.57.6]

Ours: one run of the packaged ONNX graph on ONNX Runtime CPU, the indices read back. The reference: its processor's
rescale, normalise and patchify, then its selector, in a process of its own. The two take turns, image by image, in one
run; the indices are compared. "front" adds the resize to both sides. Also measured: how fast this machine copies
memory, for the distance to the floor (the image's bytes read twice), and the memory that a run takes beyond the image
(in a fresh process, after one run on a tiny image).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

import ppexport
from ppexport.runtime.image import prepare, read
from ppexport.runtime.selector import packaged_selector

IMAGES = Path(__file__).parent.parent / "ppexport" / "bench" / "images"
SETTINGS = [(0.0, True), (0.05, True), (0.05, False)]  # tau, anchored


class Reference:
    """The reference in a process of its own."""

    def __init__(self, python: Path, path: Path):
        worker = Path(__file__).parent / "reference_selector.py"
        self.process = subprocess.Popen(
            [python, worker, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def select(self, pixels: Path, tau: float, anchored: bool, resize: bool) -> tuple[float, list[int]]:
        """(milliseconds, kept indices)."""
        assert self.process.stdin
        assert self.process.stdout
        request = {"pixels": str(pixels), "tau": tau, "anchored": anchored, "resize": resize}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["ms"], answer["keep"]


def ours(image: np.ndarray, prune: ppexport.PixelPrune, resize: bool) -> tuple[float, list[int]]:
    selector = packaged_selector(32)
    begin = time.perf_counter()
    pixels = prepare(image, 32, 65536, 16777216) if resize else image
    _, selection = selector.select(selector.backend.upload(pixels), prune)
    return (time.perf_counter() - begin) * 1e3, selection.keep.tolist()


def pictures(paths: tuple[Path, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels: real ones; two desktops made by tiling a real one; and a picture in which nothing repeats."""
    for path in paths or sorted(IMAGES.iterdir()):
        yield path.name, np.asarray(read(path))
    desktop = np.asarray(read(IMAGES / "gui_mousepad.png"))
    for width, height in ((2560, 1440), (3840, 2160)):
        tiled = np.tile(desktop, (2, 2, 1))
        yield f"desktop {width} x {height}", np.ascontiguousarray(tiled[:height, :width])
    yield "photo-like noise 1920 x 1088", photo_like(1920, 1088)
    yield "photo-like noise with two flat tokens", photo_like(1920, 1088, flat=True)


def photo_like(width: int, height: int, flat: bool = False) -> np.ndarray:
    """Smooth light and grain: no two tokens are equal. ``flat``: but for two side by side that differ by one level, for
    which anchored selection at tau > 0 has to walk through the whole picture."""
    y, x = np.mgrid[:height, :width]
    light = 128 + 60 * np.sin(x / 190) * np.cos(y / 130)
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    picture = np.clip(light[:, :, None] + grain, 0, 255).astype(np.uint8)
    if flat:
        picture[:32, :32], picture[:32, 32:64] = 128, 129
    return picture


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


MEMORY = """
import sys, numpy, ppexport
from ppexport.runtime.selector import packaged_selector
selector, prune = packaged_selector(32), ppexport.PixelPrune(tau=float(sys.argv[2]), anchored=sys.argv[3] == "1")
selector.select(selector.backend.upload(numpy.arange(64 * 64 * 3, dtype=numpy.uint8).reshape(64, 64, 3)), prune)
image = selector.backend.upload(numpy.load(sys.argv[1]))
status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
selector.select(image, prune)
print((status("VmHWM") - before) / image.nbytes)
"""


def extra_memory(pixels: Path, tau: float, anchored: bool) -> float:
    """Peak of a run over the process with the image loaded, in bytes of the image."""
    command = [sys.executable, "-c", MEMORY, str(pixels), str(tau), str(int(anchored))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def summary(times: list[float]) -> dict[str, float]:
    return {
        "n": len(times),
        "median_ms": round(median(times), 3),
        "p90_ms": round(quantiles(times, n=10)[-1], 3),
    }


@click.command()
@click.option("--reference", type=click.Path(exists=True, path_type=Path), help="A checkout of PixelPrune.")
@click.option("--reference-python", type=click.Path(exists=True, path_type=Path))
@click.option("--repeats", default=15, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(
    reference: Path | None,
    reference_python: Path | None,
    repeats: int,
    output: Path | None,
    images: tuple[Path, ...],
) -> None:
    worker = Reference(reference_python or Path(sys.executable), reference) if reference else None
    bandwidth = copy_bandwidth()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, (title, image) in enumerate(pictures(images)):
            pixels = prepare(image, 32, 65536, 16777216)
            files = [Path(name) / f"{number}-{kind}.npy" for kind in ("image", "pixels")]
            for file, array in zip(files, (image, pixels), strict=True):
                np.save(file, array)
            for (tau, anchored), front in [*((s, False) for s in SETTINGS), (SETTINGS[0], True)]:
                prune = ppexport.PixelPrune(tau=tau, anchored=anchored)
                mine, theirs = [], []
                for i in range(repeats + 2):
                    ms, keep = ours(image if front else pixels, prune, front)
                    mine += [ms] if i >= 2 else []
                    if worker and (i < 5 or i % 3 == 0):  # it is slow
                        ms, expected = worker.select(files[0 if front else 1], tau, anchored, front)
                        theirs += [ms] if i >= 2 else []
                        if keep != expected:
                            raise SystemExit(
                                f"{title}, tau {tau}: {len(keep)} kept, reference {len(expected)}"
                            )
                row = {"image": title, "size": [pixels.shape[1], pixels.shape[0]], "tau": tau}
                row |= {
                    "mode": "anchored" if anchored else "sliding",
                    "what": "front" if front else "selection",
                }
                row |= {"kept": len(keep), "tokens": pixels.size // 3072, "ours": summary(mine)}
                row["floor_ms"] = round(2 * pixels.nbytes / bandwidth / 1e6, 3)
                if not front:
                    row["extra_memory_over_image_bytes"] = round(extra_memory(files[1], tau, anchored), 2)
                if worker:
                    row |= {"reference": summary(theirs), "speedup": round(median(theirs) / median(mine), 1)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    result = {"what": "selection, resized uint8 image to kept indices", "machine": describe()}
    result |= {"copy_gb_per_s": round(bandwidth, 1), "rows": rows}
    if worker:
        for tau, mode, what in sorted({(r["tau"], r["mode"], r["what"]) for r in rows}):
            chosen = [r["speedup"] for r in rows if (r["tau"], r["mode"], r["what"]) == (tau, mode, what)]
            result[f"median_speedup {what} tau {tau} {mode}"] = median(chosen)
            print(f"{what}, tau {tau}, {mode}: median speedup {median(chosen)}")
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
