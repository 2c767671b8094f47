"""Signals that end a command: everything is cleaned up, and the exit code says which one it was (128 + its number)."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Interrupts:
    """Inside, signals become KeyboardInterrupt; ``number`` is that of the first one."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is None or threading.current_thread() is not threading.main_thread():
                continue
            if signal.getsignal(number) is not signal.SIG_IGN:  # of a job in the background, or under nohup
                self._before[number] = signal.signal(number, self._raise)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, _: object) -> None:
        self.number = self.number or number
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt once more after a signal: Python drops one that arrives in a destructor."""
        if self.number is not None:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """For a shell."""
        return 128 + (self.number or signal.SIGINT)
