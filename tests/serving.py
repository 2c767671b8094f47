"""A server of ``ppexport serve`` in a process of its own, as a user starts it."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Server:
    """A process that serves; ``url`` of it, and what it has said on stderr."""

    def __init__(self, bundle: Path, *options: str):
        command = [sys.executable, "-m", "ppexport", "serve", str(bundle), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://\S+", line):
                self.url = found[0]
                break
        else:
            raise AssertionError("".join(self.said))
        self._reader = threading.Thread(
            target=lambda: self.said.extend(self.process.stderr or ()), daemon=True
        )
        self._reader.start()

    def ask(
        self, body: Any, path: str = "/v1/chat/completions", **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of the answer; ``body`` None: GET."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, _parsed(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as err:
            return err.code, _parsed(err.read()), dict(err.headers)

    def metric(self, name: str) -> float:
        """A value of /metrics; ``name`` with its labels."""
        _, text, _ = self.ask(None, "/metrics")
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
        return float(found[1]) if found else 0.0

    def end(self, number: int) -> int:
        """Send a signal and wait for the end: the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join()
        return code


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    """A server as long as the block runs."""
    server = Server(bundle, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


def data_url(image: Path | np.ndarray) -> str:
    """An image as clients send it."""
    if isinstance(image, Path):
        data = image.read_bytes()
    else:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def asked(question: str, *images: Path | np.ndarray) -> list[dict[str, Any]]:
    """Messages with images before a question."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
