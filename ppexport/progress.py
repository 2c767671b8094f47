"""The progress bar of ``ppexport build``."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from .exporters.bundle import Plan


class Bar:
    """One line per stage on stderr; plain text where stderr is no terminal."""

    def __init__(self, quiet: bool):
        self.quiet, self.console = quiet, Console(stderr=True)
        columns = (TextColumn("{task.description:<18}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)
        self.tasks: dict[str, object] = {}

    def __enter__(self) -> Bar:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, value, trace)

    def plan(self, plan: Plan) -> None:
        """Say what will be done."""
        if self.quiet:
            return
        say = self.console.print
        say(f"{plan.checkpoint.config.family}, weights in {plan.precision}, dialect {plan.dialect}", highlight=False)
        say(f"needs {plan.disk / 1e6:.0f} MB of disk and {plan.ram / 1e6:.0f} MB of memory", highlight=False)
        for notice in plan.notices:
            say(f"notice: {notice}", highlight=False, style="yellow")

    def update(self, stage: str, done: int, total: int) -> None:
        """Show ``done`` of ``total`` steps of a stage."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=total)
            if not self.quiet and not self.console.is_terminal:
                self.console.print(stage, highlight=False)
        self.progress.update(self.tasks[stage], completed=done, total=total)  # type: ignore[arg-type]
