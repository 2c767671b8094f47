"""Every command and code block of the README and of docs/pruning.md is run, as written, in a copy of a clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PRUNING = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines() if line]


SHELL = commands(README)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository that the README names, and an environment that is already set up."""
    directory = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    for name in ("models", "ppexport", "exporters", "runtime", "tests", "docs"):
        (directory / name).symlink_to(ROOT / name)
    (directory / ".venv").mkdir()
    (directory / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    for stamp in ("runs", "exports", "tests"):
        (directory / ".venv" / stamp).touch()
    run(f"{sys.executable} -m ppexport.cli build models/pocket -o my.bundle -q", directory)
    return directory


def run(command: str, clone: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=clone, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def as_run(command: str) -> str:
    """Installations are resolved but not carried out: the tests run in what they would make."""
    return command.replace("pip install", f"{sys.executable} -m pip install --quiet --dry-run --no-deps")


@pytest.mark.parametrize("command", SHELL)
def test_command(command: str, clone: Path) -> None:
    if command.startswith("ppexport build") and "my.bundle" in command:
        shutil.rmtree(clone / "my.bundle")  # of the fixture
    out = run(as_run(command), clone)
    if command == "make demo":
        assert re.search(r"^Porto\n.*^46%\n", out, re.M | re.S)
        assert re.search(r"kept \d+ of 143 tokens", out)
        assert re.search(r"image \d.* prune \d.* vision \d.* prefill \d.* decode \d", out)
        assert (clone / "demo-out" / "overlay.png").stat().st_size > 5_000
    if command.startswith("ppexport run"):
        assert out.startswith("Porto\n")


@pytest.mark.parametrize("block", PYTHON)
def test_python_block(block: str, clone: Path) -> None:
    script = clone / "block.py"
    script.write_text(block, encoding="utf-8")
    assert re.match(r"46%\d+ of 143 tokens", run(f"{sys.executable} block.py", clone))


@pytest.mark.parametrize("command", commands(PRUNING))
def test_command_of_the_page_on_pruning(command: str, clone: Path) -> None:
    assert "kept" in run(command, clone) or "--sweep" in command


def test_python_of_the_page_on_pruning(clone: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PRUNING, re.S)
    (clone / "block.py").write_text(block, encoding="utf-8")
    assert run(f"{sys.executable} block.py", clone).startswith("297 0.0 \n[")


def test_readme_runs_the_two_commands() -> None:
    assert [c.split()[:2] for c in SHELL if c.startswith("ppexport")][:2] == [
        ["ppexport", "build"],
        ["ppexport", "run"],
    ]
    assert len(PYTHON) == 1


def test_links_and_paths_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)
        for path in re.findall(r"`((?:runtime|exporters|models|bench|tests|docs)/[\w/.]*)`", text):
            assert (ROOT / path).exists(), (page, path)
