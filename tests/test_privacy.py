"""A product that reads documents stores and sends nothing of them: no telemetry, nothing of them in the home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCREEN = str(ROOT / "docs" / "settings.png")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", SCREEN],
        ["run", "{bundle}", "-i", SCREEN, "-n", "3", "What is this?"],
        ["bench", "{bundle}", "-i", SCREEN, "--runs", "1", "--warmup", "0", "--cold", "1", "-n", "2", "-q"],
        ["doctor"],
        ["eval", "{bundle}", "-n", "1", "--skills", "read"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_nothing_is_stored_in_the_home(arguments: list[str], tiny_bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime keeps quiet in CI by itself, so this process does not say that it is one."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
    command = [
        sys.executable,
        "-m",
        "ppexport",
        *[part.replace("{bundle}", str(tiny_bundle)) for part in arguments],
    ]
    done = subprocess.run(command, cwd=work, env={**kept, "HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = [path.relative_to(tmp_path) for path in (*home.rglob("*"), *work.rglob("*")) if path.is_file()]
    # where OpenVINO is installed, which backend ran the tower sooner: no word of what was asked or shown
    assert [str(path) for path in left if not path.match("home/.cache/ppexport/vision-*.json")] == []
    assert "elemetry" not in done.stdout + done.stderr


def test_a_home_that_cannot_be_written(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without a word about it, even for a user without a home."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
    command = [sys.executable, "-m", "ppexport", "run", str(tiny_bundle), "-n", "2", "-q", "hi"]
    done = subprocess.run(command, env={**kept, "HOME": "/nonexistent"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
