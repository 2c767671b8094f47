"""Models in processes of their own, which take turns in one run: memory is told apart, and noise hits all alike."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Worker:
    """A process that answers requests; see worker.py and worker_reference.py."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        # of ours, how long loading took and its memory; of others, their packages
        self.ready = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{self.name} ended: {self.errors.read()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def ours(bundle: Path, threads: int, device: str = "cpu") -> Worker:
    """A bundle on a device."""
    command = [sys.executable, str(HERE / "worker.py"), str(bundle), str(threads), device]
    return Worker(f"ppexport {bundle.name}" + ("" if device == "cpu" else f" {device}"), command)


def optimum(python: str, exported: Path, threads: int) -> Worker:
    """optimum-intel's OpenVINO model."""
    return Worker("openvino", [python, str(HERE / "worker_openvino.py"), str(exported), str(threads)])


def llama(python: str, folder: Path, threads: int) -> Worker:
    """llama.cpp, of files that llama_convert.py wrote."""
    return Worker("llama.cpp", [python, str(HERE / "worker_llama.py"), str(folder), str(threads)])


def reference(python: str, path: str, checkpoint: Path, dtype: str, threads: int) -> Worker:
    """The authors' patched model in PyTorch."""
    command = [python, str(HERE / "worker_reference.py"), path, str(checkpoint), dtype, str(threads)]
    return Worker(f"reference {dtype}", command)
