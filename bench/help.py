"""How long ``--help`` of every command takes in a fresh process.

python bench/help.py -o bench/results/help.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

from ppexport.cli import main as ppexport


@click.command()
@click.option("--repeats", default=15, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(repeats: int, output: Path | None) -> None:
    script = Path(sys.executable).parent / "ppexport"
    times: dict[str, float] = {}
    for command in ["", *ppexport.commands]:
        runs = []
        for _ in range(repeats):
            begin = time.perf_counter()
            subprocess.run([script, *command.split(), "--help"], check=True, capture_output=True)
            runs.append((time.perf_counter() - begin) * 1e3)
        times[f"ppexport {command} --help".replace("  ", " ")] = round(median(runs), 1)
    result = {"what": "help, median milliseconds", "repeats": repeats, "machine": describe(), "rows": times}
    print(json.dumps(times, indent=1))
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
