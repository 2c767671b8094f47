"""``ppexport chat``: what is said, what commands do, and what stops an answer."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import runner

import ppexport
from ppexport.chat import Chat, prune_of, talk
from ppexport.cli import main

SCREEN = Path(__file__).parent.parent / "docs" / "settings.png"


@pytest.fixture(scope="module")
def pipe(pocket_bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(pocket_bundle)


def conversation(chat: Chat, *lines: str) -> str:
    """What is printed when these lines are typed."""
    typed = iter(lines)
    said: list[str] = []

    def read() -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    talk(chat, read, said.append)
    return "".join(said)


def test_a_conversation(pipe: ppexport.Pipeline) -> None:
    """Answers are those of the whole conversation so far, and the picture is not computed again."""
    chat = Chat(pipe)
    said = conversation(chat, f"/image {SCREEN}", "What is the Region?", "What is the Brightness?", "/stats")
    lines = said.splitlines()
    assert lines[0].startswith("image   416 x 352: kept 48 of 143 tokens")
    assert lines[1] == "Porto"
    assert "reused" in said
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    again = pipe.generate(chat.messages[:-1], max_new_tokens=512).text()
    assert lines[2] == again == chat.messages[-1]["content"]
    assert chat.stats is not None
    assert chat.stats.reused_tokens > chat.stats.kept


def test_pruning_is_changed(pipe: ppexport.Pipeline) -> None:
    chat = Chat(pipe)
    said = conversation(
        chat, "/prune off", f"/image {SCREEN}", "/prune tau=0.05 prunesid=20", f"/image {SCREEN}"
    )
    assert "kept 143 of 143" in said
    assert "kept 20 of 143" in said
    assert prune_of("", pipe) == prune_of("default", pipe) == "default"
    assert prune_of("method=unique", pipe) == (ppexport.PixelPrune(method="unique"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/imagine x", "Error: /imagine is no command, expected one of: /image"),
        ("/image", "Error: /image needs the name of a file"),
        ("/image nothing.png", "Error: nothing.png: no such file"),
        ("/prune much", "Error: much is no setting, expected off, default"),
        ("/prune tau=9", "Error: tau is 9"),
        ("/prune depth=3", "Error: pruning has no such setting"),
        ("/save /nowhere/at/all.json", "Error: /nowhere/at/all.json: cannot be written"),
        ("/stats", "nothing was asked yet"),
        ("/help", "/image FILE"),
    ],
)
def test_commands_that_say_something(pipe: ppexport.Pipeline, line: str, message: str) -> None:
    assert message in conversation(Chat(pipe), line)


def test_saving_and_beginning_anew(pipe: ppexport.Pipeline, tmp_path: Path) -> None:
    chat = Chat(pipe)
    path = tmp_path / "said.json"
    said = conversation(
        chat, f"/image {SCREEN}", "What is the Region?", f"/save {path}", "/reset", "/quit", "never"
    )
    assert f"saved {path}" in said
    assert "never" not in said
    first, second = json.loads(path.read_text())
    assert first["content"][0] == {"type": "image", "image": str(SCREEN)}
    assert second == {"role": "assistant", "content": "Porto"}
    assert chat.messages == []
    assert "saved" in conversation(chat, f"/save {path}")
    assert json.loads(path.read_text()) == []
    assert "exists, expected the name of a new file" in conversation(Chat(pipe), f"/save {path}")


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_file_that_was_dropped_on_the_terminal(pipe: ppexport.Pipeline, quote: str) -> None:
    chat = Chat(pipe)
    assert conversation(chat, f"/image {quote}{SCREEN}{quote}").startswith("image   416 x 352")
    assert chat.waiting == [str(SCREEN)]


def test_a_stopped_answer_stays_as_far_as_it_came(pipe: ppexport.Pipeline) -> None:
    chat = Chat(pipe, waiting=[SCREEN])
    said: list[str] = []

    def echo(text: str) -> None:
        said.append(text)
        if len(said) == 5:
            raise KeyboardInterrupt

    lines = iter(["Transcribe all text.", "What is the Region?", "/quit"])
    talk(chat, lambda: next(lines), echo)
    assert any("(stopped after" in text for text in said)
    assert chat.messages[1]["content"] == "".join(said[:5])
    assert len(chat.messages) == 4
    pipe.engine.step()
    assert pipe.engine.idle


def test_from_a_pipe(pocket_bundle: Path) -> None:
    done = runner().invoke(
        main, ["chat", str(pocket_bundle), "-i", str(SCREEN)], input="What is the Region?\n/stats\n"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Porto\n")
    assert "kept 48 of 143 tokens" in done.stdout


def test_what_cannot_be_done_from_a_pipe(pocket_bundle: Path) -> None:
    """An image of the command line is looked at before anything is asked; the exit code tells of what went wrong."""
    done = runner().invoke(main, ["chat", str(pocket_bundle), "-i", "missing.png"], input="")
    assert (done.exit_code, done.stderr) == (1, "Error: missing.png: no such file\n")
    done = runner().invoke(main, ["chat", str(pocket_bundle)], input="/image missing.png\nHi\n")
    assert done.exit_code == 1
    assert done.stdout.startswith("Error: missing.png: no such file\n")


@pytest.fixture
def terminal(pocket_bundle: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A conversation in a terminal of its own, and the other end of that."""
    ours, theirs = pty.openpty()

    def interruptible() -> (
        None
    ):  # a shell starts background jobs, and so perhaps this test, with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [
        sys.executable,
        "-m",
        "ppexport",
        "chat",
        str(pocket_bundle),
        "-i",
        str(SCREEN),
        "--temperature",
        "5",
    ]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=interruptible,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    yield process, ours
    process.kill()
    process.wait()
    os.close(ours)


def until(ours: int, text: str, seconds: float = 15) -> str:
    """What the terminal shows until ``text`` is there."""
    found = ""
    end = time.monotonic() + seconds
    while text not in found:
        ready, _, _ = select.select([ours], [], [], max(0.0, end - time.monotonic()))
        assert ready, found
        found += os.read(ours, 4096).decode(errors="replace")
    return found


def test_a_signal_stops_the_answer_and_not_the_program(terminal: tuple[subprocess.Popen[bytes], int]) -> None:
    process, ours = terminal
    until(ours, "> ")
    time.sleep(0.5)  # until it waits for a line
    process.send_signal(signal.SIGINT)  # nothing runs: a new line
    until(ours, "> ")
    os.write(ours, b"/help\n")
    until(ours, "Ctrl-C stops an answer")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
