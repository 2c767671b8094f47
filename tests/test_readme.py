"""Every command and code block of the README and of docs/pruning.md is run, as written, in a copy of a clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import WITHOUT_VNNI

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PRUNING = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    return [
        line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines() if line
    ]


SHELL = commands(README)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository that the README names, with an environment in which nothing of it is installed yet.

    It sees the packages of this environment, so that only the product itself is built and installed.
    """
    directory = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    for name in ("models", "ppexport", "exporters", "runtime", "docs"):
        shutil.copytree(
            ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    venv.create(directory / ".venv", with_pip=True)
    (site,) = (directory / ".venv" / "lib").glob("python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    for stamp in ("runs", "torch", "exports", "tests"):
        (directory / ".venv" / stamp).touch()
    for command in [line for line in SHELL if line.startswith("pip install")][:2]:
        run(command, directory)
    run("ppexport build models/pocket -o my.bundle -q", directory)
    return directory


def run(command: str, clone: Path) -> str:
    """As typed in the clone's root, with its environment activated."""
    environment = {**os.environ, "PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if (
        command == "make demo"
    ):  # by itself from the beginning, the other builds share what it traces with the tests
        environment.pop("PYTHONPATH")
    done = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True, env=environment)
    if "found a CPU without VNNI" in done.stderr and WITHOUT_VNNI:
        pytest.skip("w8a8 runs on CPUs with VNNI only")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("command", SHELL)
def test_command(command: str, clone: Path) -> None:
    if command.startswith("ppexport build") and "my.bundle" in command:
        shutil.rmtree(clone / "my.bundle")  # of the fixture
    out = run(command, clone)
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
    assert re.match(r"46%\d+ of 143 tokens", run("python block.py", clone))


@pytest.mark.parametrize("command", commands(PRUNING))
def test_command_of_the_page_on_pruning(command: str, clone: Path) -> None:
    assert "kept" in run(command, clone) or "--sweep" in command


def test_python_of_the_page_on_pruning(clone: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PRUNING, re.S)
    expected = (r"297 0\.0 \n\[", r"Porto \(Dropped\(pruner='pixelprune', tokens=95.*\n\[")
    for block, said in zip(blocks, expected, strict=True):
        (clone / "block.py").write_text(block, encoding="utf-8")
        assert re.match(said, run("python block.py", clone))


def test_package_is_found_from_the_root_of_a_clone(clone: Path) -> None:
    """The folder ./ppexport shadows the installed package there, and has none of its parts inside."""
    code = "import ppexport, ppexport.models, ppexport.exporters; print(ppexport.__file__, ppexport.load.__module__)"
    where, module = run(f'python -c "{code}"', clone).split()
    assert Path(where).parent == clone / "ppexport"
    assert module == "ppexport.runtime.pipeline"
    elsewhere = run(f'cd docs && python -c "{code}"', clone).split()[0]
    assert ".venv" in Path(elsewhere).parts
    version = run("python -m ppexport --version", clone)
    assert version == run("ppexport --version", clone)


def test_readme_runs_the_two_commands() -> None:
    assert [c.split()[:2] for c in SHELL if c.startswith("ppexport")][:2] == [
        ["ppexport", "build"],
        ["ppexport", "run"],
    ]
    assert len(PYTHON) == 1


def test_links_and_paths_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        headings = {
            "#" + heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.M)
        }
        for target in re.findall(r"\]\(([^)]+)\)", text):
            found = target in headings or (not target.startswith("#") and (page.parent / target).exists())
            assert target.startswith("https://") or found, (page, target)
        for path in re.findall(r"`((?:runtime|exporters|models|bench|tests|docs)/[\w/.]*)`", text):
            assert (ROOT / path).exists(), (page, path)
