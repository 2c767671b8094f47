"""On emulated 64-bit ARM: what a board would install answers there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppexport.build_bundle import build

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "examples" / "jetson" / "arm64.py"


@pytest.mark.slow  # emulation keeps all cores busy for a minute and a half
def test_a_bundle_answers(tmp_path: Path) -> None:
    """doctor, inspect, run and plan, in a Python for ARM."""
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("qemu-user-static is not installed")
    bundle = build(REPOSITORY / "models" / "pocket", tmp_path / "bundle", "fp32")
    screen = REPOSITORY / "docs" / "settings.png"
    command = [
        sys.executable,
        SCRIPT,
        bundle,
        "What is the Region?",
        "-i",
        screen,
        "--work",
        tmp_path / "arm",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode == 77 or "Command '['apt-get'" in done.stderr:
        pytest.skip(f"no packages for ARM: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on Linux aarch64" in done.stdout
    assert "\n  on cpu          runs\n" in done.stdout
    assert "kept    48 (33.6%)" in done.stdout
    assert "\nPorto\n" in done.stdout
    assert (tmp_path / "arm" / "profiles.json").is_file()


def test_without_qemu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "bundle", "What?", "-i", "x.png", "--work", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""}, check=False)
    assert done.returncode == 77
    assert "qemu-aarch64-static is not here" in done.stderr
