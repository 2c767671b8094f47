"""Commands as a user runs them, in this process."""

from __future__ import annotations

from click.testing import CliRunner


def runner() -> CliRunner:
    """Standard output and standard error apart; click 8.1 mixes them unless it is told not to."""
    try:
        return CliRunner(mix_stderr=False)  # type: ignore[call-arg]
    except TypeError:
        return CliRunner()
