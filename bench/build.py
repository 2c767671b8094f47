"""Time, peak memory and size of ``ppexport build`` on a checkpoint of real dimensions.

    python bench/build.py --shape 2b -o bench/results/build.json
    python bench/build.py --shape 2b --target tensorrt-rtx --runs 1 -o bench/results/build_rtx.json

Makes a random checkpoint of that shape (or takes --checkpoint), builds it once per run in a fresh process, and
reports wall time, that process's peak resident set (mapped file pages included) and bytes on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import random_checkpoint
from machine import describe


def build_once(checkpoint: Path, work: Path, precision: str, target: str | None) -> dict[str, float]:
    """One build in a child process; seconds, peak RSS in bytes, bundle size in bytes."""
    output = work / "bundle"
    command = [sys.executable, "-m", "ppexport.cli", "build", str(checkpoint), "-o", str(output), "-q"]
    command += ["--precision", precision, *(["--target", target] if target else [])]
    begin = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"the build failed with status {os.waitstatus_to_exitcode(status)}")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    row = {"seconds": round(seconds, 2), "peak_rss_bytes": usage.ru_maxrss * 1024, "bundle_bytes": size}
    if target:
        record = json.loads((output / "engines" / target / "record.json").read_text(encoding="utf-8"))
        for graph, engine in record["engines"].items():
            row |= {
                f"{graph}_compile_seconds": engine["build_seconds"],
                f"{graph}_engine_bytes": engine["bytes"],
            }
    shutil.rmtree(output)
    return row


@click.command()
@click.option("--shape", default="2b", show_default=True, type=click.Choice(["tiny", "300m", "2b"]))
@click.option(
    "--checkpoint", type=click.Path(exists=True, path_type=Path), help="An existing checkpoint instead."
)
@click.option("--precision", default="auto", show_default=True)
@click.option("--target", type=click.Choice(["tensorrt-rtx", "tensorrt"]), help="Compile engines, too.")
@click.option("--runs", default=3, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    shape: str, checkpoint: Path | None, precision: str, target: str | None, runs: int, output: Path | None
) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if checkpoint is None:
            checkpoint = random_checkpoint(shape, work)
        else:
            shape = checkpoint.name
        rows = [build_once(checkpoint, work, precision, target) for _ in range(runs)]
    result = {
        "what": "ppexport build",
        "shape": shape,
        "precision": precision,
        "target": target,
        "machine": describe(),
        "runs": rows,
        "median_seconds": median(r["seconds"] for r in rows),
        "peak_rss_gb": round(max(r["peak_rss_bytes"] for r in rows) / 1e9, 3),
        "bundle_gb": round(rows[0]["bundle_bytes"] / 1e9, 3),
    }
    print(json.dumps(result, indent=1))
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
