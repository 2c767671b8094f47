"""What killed builds leave behind, and the memory that is there: of the machine and of its containers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ppexport
from ppexport import memory
from ppexport.build_bundle import build
from ppexport.partial import partial_directory
from ppexport.runtime.bundle import open_bundle

WRITER = """
import sys, time
from pathlib import Path
from ppexport.partial import partial_directory
with partial_directory(Path(sys.argv[1]), "bundle.json") as work:
    (work / "half").touch()
    print("writing", flush=True)
    time.sleep(600)
"""


def writing(output: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing a directory."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_what_killed_builds_left_is_removed_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new [1].bundle"
    alive = writing(output)
    for killed in (writing(output), writing(tmp_path / "other.bundle")):
        killed.kill()
        killed.wait()
    (tmp_path / f".{output.name}.notes.partial").write_text("a file")
    before = {path.name for path in tmp_path.iterdir()}
    assert len(before) == 4
    build(tiny_checkpoint, output)
    left = {path.name for path in tmp_path.iterdir()} - {output.name}
    assert len(left) == 3  # of the one that is still writing, of another output, and the file
    assert sum(name.startswith(".other.bundle.") for name in left) == 1
    alive.kill()
    alive.wait()


@pytest.mark.parametrize("given", ["empty", ".", "link"])
def test_an_empty_directory_is_a_place_to_write_to(
    given: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays the directory that it is: a mount cannot be renamed over, nor should a shell's own directory be."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    number = empty.stat().st_ino
    monkeypatch.chdir(empty if given == "." else tmp_path)
    built = build(tiny_checkpoint, given)
    assert open_bundle(built)[1].family == "qwen3_vl"
    assert empty.stat().st_ino == number
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link"}
    assert not [path for path in empty.iterdir() if path.name.endswith(".partial")]


def test_a_failed_build_leaves_an_empty_directory_empty(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").write_text("{}")
    (tmp_path / "out").mkdir()
    with pytest.raises(ppexport.CheckpointError, match="do not work"):
        build(checkpoint, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_directory_that_is_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    def write(output: Path) -> None:
        with partial_directory(output, "b") as work:
            (work / "b").touch()
            output.mkdir(exist_ok=True)
            (output / "precious").touch()

    (tmp_path / "there").mkdir()
    for name in ("there", "not there"):
        with pytest.raises(ppexport.BundleError, match="was filled while"):
            write(tmp_path / name)
        assert os.listdir(tmp_path / name) == ["precious"]
    assert sorted(os.listdir(tmp_path)) == ["not there", "there"]


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 8 GB available and no control groups."""
    for name, file in (("MEMINFO", "meminfo"), ("CGROUP", "cgroup"), ("GROUPS", "groups")):
        monkeypatch.setattr(memory, name, tmp_path / file)
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    return tmp_path


def group(directory: Path, version: int, limit: str, usage: int, inactive: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    most, current, key = memory.VERSION_1 if version == 1 else memory.VERSION_2
    (directory / most).write_text(f"{limit}\n")
    (directory / current).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{key} {inactive}\n")


def test_memory_of_the_machine(system: Path) -> None:
    assert memory.available_memory() == 8_000_000 * 1024
    (system / "meminfo").unlink()
    assert memory.available_memory() is None


def test_memory_of_a_container(system: Path) -> None:
    """Version 2, seen from inside: the container's group is the root."""
    (system / "cgroup").write_text("0::/docker/abc\n")
    group(system / "groups", 2, "3000000000", 2_500_000_000, 400_000_000)
    assert memory.available_memory() == 900_000_000
    group(system / "groups", 2, "max", 2_500_000_000, 0)
    assert memory.available_memory() == 8_000_000 * 1024


def test_memory_of_nested_groups(system: Path) -> None:
    """Version 2, seen from outside: the limit may be that of a group around."""
    (system / "cgroup").write_text("0::/user.slice/session.scope\n")
    group(system / "groups" / "user.slice" / "session.scope", 2, "max", 100, 0)
    group(system / "groups" / "user.slice", 2, "2000000000", 1_900_000_000, 0)
    assert memory.available_memory() == 100_000_000


def test_memory_of_version_1(system: Path) -> None:
    (system / "cgroup").write_text("12:cpu,cpuacct:/x\n9:memory:/docker/abc\n0::/\n")
    group(system / "groups" / "memory", 1, "1000000000", 1_200_000_000, 500_000_000)
    assert memory.available_memory() == 300_000_000
    group(system / "groups" / "memory", 1, str(2**63 - 4096), 1, 0)
    assert memory.available_memory() == 8_000_000 * 1024


def test_memory_here_is_a_number() -> None:
    found = memory.available_memory()
    assert found is None or 0 < found < 1 << 50


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_signals_have_their_exit_codes(
    command: str, sent: signal.Signals, code: int, tiny_bundle: Path
) -> None:
    """While it works, without a traceback."""
    images = Path(__file__).parent.parent / "ppexport" / "bench" / "images"
    arguments = {
        "run": [str(tiny_bundle), "-n", "30000", *["hello"] * 500],
        "inspect": [str(images / "gui_mousepad.png")] * 500,
    }[command]
    process = subprocess.Popen(
        [sys.executable, "-m", "ppexport", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if command == "run":
        assert process.stdout is not None
        process.stdout.read(1)  # the first piece of an answer
    else:
        time.sleep(2)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.endswith("Aborted!\n")
    assert "Traceback" not in err
