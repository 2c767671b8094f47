"""The progress bar of ``ppexport build``."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .device_memory import memory
from .interrupts import Interrupts
from .models.config import ModelConfig
from .models.manifest import Manifest
from .models.profiles import Profiles

if TYPE_CHECKING:
    from .exporters.bundle import Plan


class Bar:
    """One line per stage on stderr, plain text where that is no terminal. ``interrupts``: those that end the work."""

    def __init__(self, quiet: bool, interrupts: Interrupts | None = None):
        self.quiet = quiet
        self.interrupts = interrupts or Interrupts()
        self.console = Console(stderr=True)
        columns = (TextColumn("{task.description:<18}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns, console=self.console, disable=quiet or not self.console.is_terminal
        )
        self.tasks: dict[str, object] = {}

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def plan(self, plan: Plan, sizes: Profiles | None) -> None:
        """Say what will be done, and what the engines for ``sizes`` will need."""
        if self.quiet:
            return
        say = self.console.print
        say(
            f"{plan.checkpoint.config.family}, weights in {plan.precision}, dialect {plan.dialect}",
            highlight=False,
        )
        say(f"needs {plan.disk / 1e6:.0f} MB of disk and {plan.ram / 1e6:.0f} MB of memory", highlight=False)
        if sizes is not None:
            self._sizes(plan.checkpoint.config, plan.compute, plan.weights, sizes, plan.dialect)
        for notice in plan.notices:
            say(f"notice: {notice}", highlight=False, style="yellow")

    def sizes(self, manifest: Manifest, weights: int, sizes: Profiles) -> None:
        """Say what engines of a bundle for ``sizes`` take and need on the device."""
        if not self.quiet:
            dialect = manifest.graphs["language"].dialect
            self._sizes(manifest.model, manifest.compute, weights, sizes, dialect)

    def _sizes(self, model: ModelConfig, compute: str, weights: int, sizes: Profiles, dialect: str) -> None:
        need = memory(model, compute, weights, sizes, dialect)
        kept = max(profile["K"][2] for profile in sizes.vision)
        images = f", images of up to {kept} kept tokens" if model.sees else ""
        parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in need.items())
        self.console.print(
            f"engines for {sizes.capacity} tokens{images}: "
            f"about {sum(need.values()) / 1e6:.0f} MB on the device ({parts})",
            highlight=False,
            soft_wrap=True,
        )

    def update(self, stage: str, done: int, total: int) -> None:
        """Show ``done`` of ``total`` steps of a stage; "stage: phase" shows the phase it is in, too.

        Raises KeyboardInterrupt after a signal.
        """
        self.interrupts.check()
        name = stage.partition(": ")[0]
        if not self.tasks:
            self.progress.start()  # not sooner: downloads have bars of their own
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total)
            if not self.quiet and not self.console.is_terminal:
                self.console.print(name, highlight=False)
        text = stage if done < total else name
        self.progress.update(self.tasks[name], completed=done, total=total, description=text)  # type: ignore[arg-type]
