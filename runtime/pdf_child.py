"""Draws a page of a PDF in a process of its own: what a document asks for may take any time and memory, or crash.

On standard input: how many bytes the document has, the page, the bytes; then for each picture its width and height. On
standard output: a line of JSON, {"size": [width, height]} in points or {"error": ...}, then every picture as RGB.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any, BinaryIO

MEMORY = 2 << 30  # bytes of address space


def main() -> None:
    """Serve one page."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = sys.stdin.buffer
    told = sys.stdout.buffer
    size, number = map(int, asked.readline().split())
    data = asked.read(size)
    try:
        _serve(data, number, asked, told)
    except Exception as err:
        _tell(told, {"error": f"{err}" or type(err).__name__})


def _serve(data: bytes, number: int, asked: BinaryIO, told: BinaryIO) -> None:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as err:
        locked = "password" in str(err).lower()
        wanted = "one without a password" if locked else "a PDF with pages, that PDFium can open"
        _tell(told, {"error": f"cannot be opened ({err}), expected {wanted}"})
        return
    pages = len(document)
    if number > pages:
        _tell(told, {"error": f"has {pages} page{'s' * (pages != 1)}, found no {number}"})
        return
    page = document[number - 1]
    _tell(told, {"size": page.get_size()})
    for line in asked:
        width, height = map(int, line.split())
        told.write(_drawn(pypdfium2, page, width, height))
        told.flush()


def _drawn(pdfium: Any, page: Any, width: int, height: int) -> bytes:
    """The page on white, exactly so large: RGB."""
    bitmap = pdfium.PdfBitmap.new_native(width, height, pdfium.raw.FPDFBitmap_BGR)
    bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
    pdfium.raw.FPDF_RenderPageBitmap(bitmap, page, 0, 0, width, height, 0, pdfium.raw.FPDF_ANNOT)
    found: bytes = bitmap.to_pil().convert("RGB").tobytes()
    return found


def _tell(told: BinaryIO, what: dict[str, Any]) -> None:
    told.write(json.dumps(what).encode() + b"\n")
    told.flush()
