"""``ppexport chat``: a conversation in the terminal. What it began with is not computed again."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from .interrupts import Interrupts
from .models.checks import shown
from .models.errors import PpexportError, RequestError
from .models.files import write_text
from .models.pruners import changed, with_budget
from .run import kept_line, summary
from .runtime.pdf import expanded
from .runtime.pipeline import Pipeline
from .runtime.sequence import PruneLike
from .runtime.stats import Stats

HELP = """/image FILE     show a picture (or report.pdf#3) with the next question
/prune SETTINGS how to prune from now on: off, default, tau=0.02, method=unique, max_tokens=400, prunesid=64
/stats          what the last answer took
/save FILE      write the conversation as JSON
/reset          begin anew
/help           this
/quit           end (also Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Chat:
    """One conversation with a bundle; ``say`` answers a line."""

    pipe: Pipeline
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    prune: PruneLike = "default"
    messages: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)  # images for the next question
    stats: Stats | None = None
    saved: set[Path] = field(default_factory=set)  # files that conversations were written to

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer to a question, piece by piece. What was said of it stays in the conversation, however it ends."""
        parts = [{"type": "image", "image": image} for image in self.waiting]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        answer = self.pipe.generate(
            [*self.messages, turn],
            prune=self.prune,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        self.stats = answer.stats
        self.waiting = []
        self.messages.append(turn)
        pieces: list[str] = []
        try:
            for piece in answer:
                pieces.append(piece)
                yield piece
        finally:
            said = "".join(pieces)
            self.messages += [{"role": "assistant", "content": said}] if said else []
            if not said:
                self.messages.pop()

    def command(self, line: str) -> str | None:
        """Do what a line that begins with "/" says: what to print, None to end. Raises PpexportError."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        known: dict[str, Callable[[str], str | None]] = {
            "/image": self._image,
            "/prune": self._prune,
            "/stats": self._stats,
            "/save": self._save,
            "/reset": self._reset,
            "/help": lambda _: HELP,
            "/quit": lambda _: None,
        }
        if name not in known:
            raise RequestError(f"{name:.40} is no command, expected one of: {', '.join(known)}")
        return known[name](rest)

    def _image(self, path: str) -> str:
        if not path:
            raise RequestError("/image needs the name of a file")
        quoted = len(path) > 1 and path[0] == path[-1]
        if quoted and path[0] in "'\"":  # a file that was dropped on the terminal
            path = path[1:-1]
        return self.show(path)

    def show(self, path: str) -> str:
        """Show an image with the next question: what is kept of it. Raises ImageError."""
        pages = expanded(path)
        views = [self.pipe.select(page, self.prune) for page in pages]  # raises now for what cannot be shown
        self.waiting += pages
        return "\n".join(kept_line(view) for each in views for view in each)

    def _prune(self, text: str) -> str:
        self.prune = prune_of(text, self.pipe)
        return f"pruning: {text or 'default'}"

    def _stats(self, _: str) -> str:
        if self.stats is None:
            return "nothing was asked yet"
        return "\n".join(summary(self.stats))

    def _save(self, path: str) -> str:
        if not path:
            raise RequestError("/save needs the name of a file")
        target = Path(path)
        if target.exists() and target not in self.saved:
            raise RequestError(f"{path}: exists, expected the name of a new file")
        plain = json.dumps(self.messages, ensure_ascii=False, indent=1, default=str)
        write_text(target, plain + "\n")
        self.saved.add(target)
        return f"saved {shown(path)}"

    def _reset(self, _: str) -> str:
        self.messages = []
        self.waiting = []
        return "a new conversation"


def prune_of(text: str, pipe: Pipeline) -> PruneLike:
    """What "tau=0.02 prunesid=64" stands for, given a bundle's own pruners. Raises RequestError."""
    if text in ("", "default"):
        return "default"
    if text == "off":
        return None
    settings: dict[str, Any] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals:
            raise RequestError(
                f"{part:.40} is no setting, expected off, default, or settings such as tau=0.02"
            )
        settings[name] = _value(value)
    budget = settings.pop("prunesid", None)
    try:
        found = changed(pipe.prune, settings) if settings else pipe.prune
        return with_budget(found, budget) if budget is not None else found
    except TypeError as err:
        raise RequestError(f"pruning has no such setting: {err}") from err


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def talk(
    chat: Chat,
    read: Callable[[], str],
    echo: Callable[[str], None],
    stopped: Callable[[], None] = lambda: None,
) -> bool:
    """Read lines and answer them until /quit or the end of the input; errors are told, and the conversation goes on.

    ``stopped`` is called after Ctrl-C has stopped an answer, and may raise to end the conversation. Returns whether
    there were no errors.
    """
    well = True
    while True:
        try:
            line = read().strip()
        except EOFError:
            return well
        except KeyboardInterrupt:
            stopped()
            echo("\n")
            continue
        if not line:
            continue
        try:
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    return well
                echo(said + "\n")
            else:
                _answer(chat, line, echo, stopped)
        except PpexportError as err:
            echo(f"Error: {err}\n")
            well = False


def _answer(chat: Chat, question: str, echo: Callable[[str], None], stopped: Callable[[], None]) -> None:
    """Print an answer as it comes; Ctrl-C stops it."""
    begin = time.perf_counter()
    pieces = chat.ask(question)
    try:
        for piece in pieces:
            echo(piece)
        echo("\n")
    except KeyboardInterrupt:
        pieces.close()
        stopped()
        echo(f"\n(stopped after {time.perf_counter() - begin:.1f} s)\n")


def main(chat: Chat, interrupts: Interrupts) -> bool:
    """A conversation on the terminal, or with what is piped in; SIGINT stops an answer, other signals end all.

    Returns False where something that was piped in could not be done.
    """
    inside = sys.stdin.isatty()
    if inside:
        with contextlib.suppress(ImportError):  # line editing; not on Windows
            import readline  # noqa: F401

    def stopped() -> None:
        if interrupts.number not in (None, signal.SIGINT):
            raise KeyboardInterrupt
        interrupts.number = None

    def read() -> str:
        return input("> " if inside else "")

    def echo(text: str) -> None:
        click.echo(text, nl=False)
        sys.stdout.flush()

    if inside:
        echo(f"{chat.pipe.chosen}; /help lists commands\n")
    return talk(chat, read, echo, stopped) or inside
