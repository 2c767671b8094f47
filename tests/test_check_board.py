"""What people with a board run and send back: every step, in one file, whatever fails."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulator
import pytest
from terminal import runner

from ppexport.build_bundle import build
from ppexport.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "examples" / "jetson" / "check_board.py"
SCREENS = REPOSITORY / "examples" / "latency_gate" / "screens"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pocket = REPOSITORY / "models" / "pocket"
    return build(pocket, tmp_path_factory.mktemp("board") / "bundle", "fp16", "plain")


def test_on_the_emulated_board(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands run in this process, where TensorRT is emulated."""
    spec = importlib.util.spec_from_file_location("check_board", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    output = tmp_path / "board.json"

    def said(command: list[str], seconds: float | None = None) -> dict[str, Any]:
        if command[:3] != [sys.executable, "-m", "ppexport"]:
            return {"command": command, "exit_code": 0, "seconds": 0.0, "out": "", "err": ""}
        arguments = [part if part != "0,off" else "0" for part in command[3:]]
        if arguments[0] == "bench":  # no new processes: those have no emulated GPU
            at = arguments.index("--duration")
            arguments[at : at + 2] = ["--runs", "1", "--warmup", "0", "--cold", "0"]
        result = runner().invoke(main, arguments)
        return {
            "command": command,
            "exit_code": result.exit_code,
            "seconds": 0.0,
            "out": result.stdout,
            "err": result.stderr,
        }

    monkeypatch.setattr(script, "said", said)
    monkeypatch.setattr(sys, "argv", ["check_board.py", str(copy), "-i", str(SCREENS), "-o", str(output)])
    with emulator.installed("tensorrt"), pytest.raises(SystemExit) as ended:
        script.main()
    found = json.loads(output.read_text())
    assert [step["command"][3] for step in found["steps"] if step["exit_code"]] == []
    assert not ended.value.code
    names = [step["command"][3] for step in found["steps"]]
    assert names == ["doctor", "plan", "build", "doctor", "plan", "verify", "run", "bench", "bench"]
    assert json.loads(found["steps"][5]["out"])[0]["problems"] == []
    assert set(found["bench"]) == {"tensorrt", "cpu"}


def test_what_fails_is_told(bundle: Path, tmp_path: Path) -> None:
    """Here, without TensorRT: what works has its result, what does not its error."""
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed")
    output = tmp_path / "board.json"
    screen = sorted(SCREENS.glob("*.png"))[0]
    command = [sys.executable, SCRIPT, bundle, "-i", screen, "-o", output, "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "failed: build, plan, verify, run, bench" in done.stdout
    found = json.loads(output.read_text())
    assert "tensorrt cannot be imported" in found["steps"][2]["err"]
    assert "cpu" in found["bench"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bundle": "nothing"}, "nothing: is not here"),
        ({"-i": "empty"}, "empty: holds no image"),
        ({"-o": "missing/b.json"}, "missing/b.json: cannot be written"),
        ({"--seconds": "-5"}, "--seconds is -5, expected 1 at least"),
    ],
)
def test_what_is_refused(bundle: Path, tmp_path: Path, changed: dict[str, str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    given = {"bundle": str(bundle), "-i": str(SCREENS), "-o": "b.json", "--seconds": "1"} | changed
    options = [part for name in ("-i", "-o", "--seconds") for part in (name, given[name])]
    command = [sys.executable, str(SCRIPT), given["bundle"], *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False), (
        done.stderr
    )
