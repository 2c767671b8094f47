"""Everything that one has to know of a board, in one go: engines are built, held against the CPU, and measured.

    python check_board.py pocket.bundle -i screens/ -o board.json

The bundle is of dialect plain in fp16, which the board's CPU runs, too. Each step is a command of ppexport. What it
said and how long it took goes into one JSON file, with the board's power mode, clocks and temperatures, whether all of
it works or not. The exit code is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KEPT = 20_000  # characters of what a step said
LONGEST = 3 * 3600  # seconds of a step; building a large model takes a while
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# what the board itself tells; each is left out where it is missing
SYSTEM = (
    ["nvpmodel", "-q"],
    ["jetson_clocks", "--show"],
    ["tegrastats", "--interval", "500"],
    ["nvidia-smi"],
    ["uname", "-a"],
    ["free", "-m"],
)


def said(command: list[str], seconds: float | None = None) -> dict[str, Any]:
    """Run a command, for so many seconds at most, and keep what it said."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:  # tegrastats never ends by itself
        code = 0 if command[0] == "tegrastats" else 124
        out, err = ((raw or b"").decode(errors="replace") for raw in (stopped.stdout, stopped.stderr))
    except OSError as failed:
        code, out, err = 127, "", str(failed)
    return {
        "command": command,
        "exit_code": code,
        "seconds": round(time.perf_counter() - begin, 2),
        "out": out[-KEPT:],
        "err": err[-KEPT:],
    }


def system() -> list[dict[str, Any]]:
    """Power mode, clocks, temperatures, memory."""
    return [said(command, 3) for command in SYSTEM if shutil.which(command[0])]


def pictures(image: Path) -> list[str]:
    """The image, or those of a folder."""
    if not image.is_dir():
        return [str(image)]
    return sorted(str(path) for path in image.iterdir() if path.suffix.lower() in PICTURES)


def steps(bundle: Path, image: Path, target: str, seconds: int, work: Path) -> list[list[str]]:
    """The commands, in their order."""
    shown = pictures(image)
    asked = [part for each in shown[:3] for part in ("-i", each)]
    bench = ["bench", "run", str(bundle), "-i", str(image), "--tau", "0,off", "--duration", str(seconds)]
    return [
        ["doctor"],
        ["plan", "--memory", "--bundle", str(bundle)],
        ["build", str(bundle), "--target", target],
        ["doctor", str(bundle)],
        ["plan", *shown, "--bundle", str(bundle), "--measure", target],
        ["verify", str(bundle), "--against-cpu", "--device", target, *asked, "--json"],
        ["run", str(bundle), "--device", target, "-i", shown[0], "What is shown?", "--json"],
        [*bench, "--device", target, "-o", str(work / f"{target}.json"), "-q"],
        [*bench, "--device", "cpu", "--cold", "0", "-o", str(work / "cpu.json"), "-q"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-i", "--image", type=Path, required=True, help="An image, or a folder of them.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--target", default="tensorrt", choices=["tensorrt", "tensorrt-rtx"])
    parser.add_argument("--seconds", type=int, default=120, help="That each device is measured for.")
    given = parser.parse_args()
    for path in (given.bundle, given.image):
        if not path.exists():
            parser.error(f"{path}: is not here")
    if not pictures(given.image):
        parser.error(f"{given.image}: holds no image, expected some ({', '.join(PICTURES)})")
    if given.seconds < 1:
        parser.error(f"--seconds is {given.seconds}, expected 1 at least")
    try:
        given.output.write_text("{}\n", encoding="utf-8")
    except OSError as err:
        parser.error(f"{given.output}: cannot be written: {err}")
    work = Path(tempfile.mkdtemp(prefix="check_board."))
    found: dict[str, Any] = {"target": given.target, "before": system(), "steps": [], "bench": {}}
    failed = []
    for command in steps(given.bundle, given.image, given.target, given.seconds, work):
        print(f"ppexport {' '.join(command)[:100]} ...", end=" ", flush=True)
        step = said([sys.executable, "-m", "ppexport", *command], LONGEST)
        found["steps"].append(step)
        print("ok" if step["exit_code"] == 0 else f"failed: {step['err'].strip().splitlines()[-1:]}")
        if step["exit_code"]:
            failed.append(command[0])
        for part in work.glob("*.json"):
            try:
                found["bench"][part.stem] = json.loads(part.read_text(encoding="utf-8"))
            except ValueError as err:  # of a bench that was cut off
                found["bench"][part.stem] = {"error": str(err)}
        found["after"] = system()
        given.output.write_text(
            json.dumps(found, indent=1) + "\n", encoding="utf-8"
        )  # so far, if it is cut off
    shutil.rmtree(work)
    print(f"wrote {given.output}; failed: {', '.join(failed) or 'nothing'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
