"""Pages of PDF files as images, drawn by PDFium at the size that a model asks for.

A page is named as ``report.pdf`` (the first), ``report.pdf#3``, several as ``report.pdf#2-5``; the same behind the data
of a ``data:application/pdf`` URL.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..models.errors import BackendError, ImageError

DOTS = 150  # pixels per inch where nothing else limits the size: text of 10 points is 21 pixels high
POINTS = 72  # per inch
MOST_PIXELS = 16_777_216  # of a page, drawn
MOST_PAGES = 64  # that one name may stand for
SECONDS = 20.0  # for one page: what it draws may be anything
NAMED = re.compile(r"(.*\.pdf)(?:#(\d{1,6})(?:-(\d{1,6}))?)?", re.IGNORECASE | re.DOTALL)
INLINE = re.compile(r"(data:application/pdf;base64,[^#]*)(?:#(\d{1,6})(?:-(\d{1,6}))?)?", re.IGNORECASE)
MAGIC = b"%PDF-"
_PDFIUM = threading.Lock()  # it is not made for threads


@dataclass(frozen=True)
class PageName:
    """Which pages of which document, counted from 1."""

    document: str  # a path, or a data: URL without what stands behind it
    first: int
    last: int

    def single(self, number: int) -> str:
        """The name of one page."""
        return f"{self.document}#{number}"


def page_name(image: object) -> PageName | None:
    """Of a string or path that names pages of a PDF; None for other images. Raises ImageError for impossible pages."""
    if not isinstance(image, (str, os.PathLike)):
        return None
    text = os.fspath(image)
    if not isinstance(text, str):
        return None
    found = INLINE.fullmatch(text) if text[:5].lower() == "data:" else NAMED.fullmatch(text)
    if found is None:
        return None
    first = int(found[2] or 1)
    last = int(found[3] or first)
    if not 1 <= first <= last or last - first >= MOST_PAGES:
        raise ImageError(
            f"{text[-60:]}: names the pages {first} to {last}, expected rising ones from 1 on, at most {MOST_PAGES}"
        )
    return PageName(found[1], first, last)


def expanded(image: Any) -> list[Any]:
    """An image, or one for each of the pages that its name stands for: "a.pdf#2-3" -> "a.pdf#2" and "a.pdf#3"."""
    name = page_name(image)
    if name is None or name.first == name.last:
        return [image]
    return [name.single(number) for number in range(name.first, name.last + 1)]


class Page:
    """One page of a document, as ``data``; ``name``: for errors. Raises ImageError, BackendError without pypdfium2."""

    def __init__(self, data: bytes, number: int, name: str):
        self._data = data
        self._number = number
        self.name = name
        with self._opened() as page:
            width, height = page.get_size()  # points
        if not (math.isfinite(width * height) and width > 0 and height > 0):
            raise ImageError(f"{name}: its page is {width} x {height} points large, expected a size to draw")
        scale = min(DOTS / POINTS, math.sqrt(MOST_PIXELS / (width * height)))
        self.size = (max(1, round(width * scale)), max(1, round(height * scale)))  # width, height in pixels

    def draw(self, width: int, height: int) -> Image.Image:
        """The page on white, RGB, exactly so large."""
        with self._opened() as page:
            return _drawn(page, width, height, self.name)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        pdfium = _pypdfium2()
        with _PDFIUM:
            try:
                document = pdfium.PdfDocument(self._data)
            except pdfium.PdfiumError as err:
                locked = "password" in str(err).lower()
                wanted = "one without a password" if locked else "a PDF that PDFium can open"
                raise ImageError(f"{self.name}: cannot be opened ({err}), expected {wanted}") from err
            try:
                pages = len(document)
                if self._number > pages:
                    raise ImageError(
                        f"{self.name}: has {pages} page{'s' * (pages != 1)}, found no {self._number}"
                    )
                yield document[self._number - 1]
            except pdfium.PdfiumError as err:
                raise ImageError(f"{self.name}: page {self._number} cannot be drawn ({err})") from err
            finally:
                document.close()


def _drawn(page: Any, width: int, height: int, name: str) -> Image.Image:
    """Draw in steps, so that a page that takes too long can be given up. Raises ImageError."""
    pdfium = _pypdfium2()
    raw = pdfium.raw
    end = time.monotonic() + SECONDS
    bitmap = pdfium.PdfBitmap.new_native(width, height, raw.FPDFBitmap_BGR)
    bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
    pause = raw.IFSDK_PAUSE(version=1, user=None)
    kind = type(pause.NeedToPauseNow)
    pause.NeedToPauseNow = kind(lambda _: time.monotonic() > end)
    try:
        status = raw.FPDF_RenderPageBitmap_Start(
            bitmap, page, 0, 0, width, height, 0, raw.FPDF_ANNOT, ctypes.byref(pause)
        )
        if status == raw.FPDF_RENDER_TOBECONTINUED:
            raise ImageError(f"{name}: takes more than {SECONDS:g} s to draw, expected a simpler page")
        if status == raw.FPDF_RENDER_FAILED:
            raise ImageError(f"{name}: PDFium could not draw it")
        return bitmap.to_pil().convert("RGB")
    finally:
        raw.FPDF_RenderPage_Close(page)
        bitmap.close()


def _pypdfium2() -> Any:
    try:
        import pypdfium2
    except ImportError as err:
        raise BackendError(
            "pypdfium2 is not installed, expected for PDF files; install it with: pip install 'ppexport[pdf]'"
        ) from err
    return pypdfium2


def is_pdf(data: bytes) -> bool:
    """Do these bytes begin as a PDF does?"""
    return data[:1024].lstrip().startswith(MAGIC)
