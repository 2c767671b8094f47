"""Pages of PDF files as images, drawn by PDFium at the size that a model asks for.

A page is named as ``report.pdf`` (the first), ``report.pdf#3``, several as ``report.pdf#2-5``; the same behind a
``file:`` or ``data:`` URL. PDFium runs in a process of its own (pdf_child.py), with limits of time and memory.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from ..models.errors import BackendError, ImageError

DOTS = 150  # pixels per inch where nothing else limits the size: text of 10 points is 21 pixels high
POINTS = 72  # per inch
MOST_PIXELS = 16_777_216  # of a page, drawn
MOST_PAGES = 64  # that one name may stand for
SECONDS = 20.0  # for one page, opening the document included
NAMED = re.compile(r"(.*\.pdf|data:[^#,]*,[^#]*)#(\d{1,6})(?:-(\d{1,6}))?", re.IGNORECASE | re.DOTALL)
MAGIC = b"%PDF-"
# the paths of this process, in which the other one is to find what this one finds
CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from ppexport.runtime.pdf_child import main; main()"


@dataclass(frozen=True)
class PageName:
    """Which pages of which document, counted from 1."""

    document: str  # a path or a URL, without what stands behind it
    first: int
    last: int


def page_name(image: object) -> PageName | None:
    """Of a string or path that ends with pages of a PDF; None for others. Raises ImageError for impossible pages."""
    if not isinstance(image, (str, os.PathLike)):
        return None
    text = os.fspath(image)
    if not isinstance(text, str):
        return None
    found = NAMED.fullmatch(text)
    if found is None or (text[:5].lower() != "data:" and os.path.exists(text)):
        return None
    first = int(found[2])
    last = int(found[3] or first)
    if not 1 <= first <= last or last - first >= MOST_PAGES:
        raise ImageError(
            f"{text[-60:]}: names the pages {first} to {last}, expected rising ones from 1 on, at most {MOST_PAGES}"
        )
    return PageName(found[1], first, last)


def file_of(image: str | os.PathLike[str]) -> Path:
    """The file that a name of an image stands for: of pages, their document."""
    name = page_name(image)
    return Path(name.document if name else image)


def expanded(image: Any) -> list[Any]:
    """An image, or one for each of the pages that its name stands for: "a.pdf#2-3" -> "a.pdf#2" and "a.pdf#3"."""
    name = page_name(image)
    if name is None or name.first == name.last:
        return [image]
    return [f"{name.document}#{number}" for number in range(name.first, name.last + 1)]


def is_pdf(data: bytes) -> bool:
    """Do these bytes begin as a PDF does?"""
    return MAGIC in data[:1024]


class Page:
    """One page of a document, open as long as the block of a ``with`` runs; ``name``: for errors.

    Raises ImageError for what cannot be drawn, takes too long or too much memory, BackendError without pypdfium2.
    """

    def __init__(self, data: bytes, number: int, name: str):
        if importlib.util.find_spec("pypdfium2") is None:
            raise BackendError(
                "pypdfium2 is not installed, expected for PDF files; install it with: pip install 'ppexport[pdf]'"
            )
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._late = threading.Timer(SECONDS, self._process.kill)
        self._late.daemon = True
        self._late.start()
        try:
            self.size = self._opened(data, number)  # width, height in pixels, where nobody asks for others
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._late.cancel()
        self._process.kill()
        self._process.communicate()

    def draw(self, width: int, height: int) -> Image.Image:
        """The page on white, RGB, exactly so large."""
        self._send(f"{width} {height}\n".encode())
        assert self._process.stdout is not None
        found = self._process.stdout.read(3 * width * height)
        if len(found) < 3 * width * height:
            raise self._ended()
        return Image.frombytes("RGB", (width, height), found)

    def _opened(self, data: bytes, number: int) -> tuple[int, int]:
        self._send(f"{len(data)} {number}\n".encode() + data)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        told = json.loads(line)
        if "error" in told:
            raise ImageError(f"{self.name}: {told['error']}")
        width, height = told["size"]  # points
        if not (math.isfinite(width * height) and width > 0 and height > 0):
            raise ImageError(
                f"{self.name}: its page is {width} x {height} points large, expected a size to draw"
            )
        scale = min(DOTS / POINTS, math.sqrt(MOST_PIXELS / (width * height)))
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError as err:
            raise self._ended() from err

    def _ended(self) -> ImageError:
        """The other process has gone."""
        self._process.wait()
        if not self._late.is_alive():
            return ImageError(f"{self.name}: takes more than {SECONDS:g} s to draw, expected a simpler page")
        return ImageError(
            f"{self.name}: cannot be drawn: PDFium ran out of memory or crashed, expected a simpler page"
        )
