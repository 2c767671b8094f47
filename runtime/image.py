"""Any image file or array -> uint8 [H, W, 3] at the size the vision tower takes.

Sizes, cuts and resampling (PIL's bicubic filter) are those of transformers' PIL image processors for each family, bit
for bit. What those processors would lose is kept:
transparent pixels are put on white (it would show whatever colour lies under them), 16-bit gray is scaled (not cut).
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..models.errors import ImageError, RequestError
from ..models.family import Frame, View, Views
from ..models.resize import MAX_PIXELS as MAX_SOURCE_PIXELS
from ..models.resize import MIN_SIDE, smart_resize
from .pdf import Page, expanded, file_of, is_pdf, page_name

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray

MIN_PIXELS = 65536
MAX_PIXELS = 16777216  # of Qwen3-VL, where nothing else is asked for
MAX_FILE_BYTES = 256 << 20
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # looked for in folders
SCHEME = re.compile(
    r"(data):|([a-z][a-z0-9+.-]+)://", re.IGNORECASE
)  # of a URL; a drive of Windows is one letter
WARNINGS = threading.Lock()  # Python's filters of warnings belong to all threads


def images_in(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Files, and of folders every file with the suffix of an image, by name. Raises ImageError if there are none."""
    found = []
    for path in [Path(page) for given in paths for page in expanded(given)]:
        try:
            if path.is_dir():
                files = sorted(
                    file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()
                )
                if not files:
                    raise ImageError(f"{path}: holds no images, expected files such as {', '.join(SUFFIXES)}")
                found += files
            elif not file_of(path).exists():
                raise ImageError(f"{path}: no such file")
            else:
                found.append(path)
        except (OSError, ValueError) as err:
            raise ImageError(f"{path}: cannot be read: {err}") from err
    return found


def prepare(image: ImageLike, block: int, min_pixels: int, max_pixels: int) -> np.ndarray:
    """Read and resize for one view: uint8 [H, W, 3], H and W multiples of ``block``, contiguous.

    Raises ImageError if the image cannot be read or its size is outside the limits, RequestError for a wrong type,
    dtype or shape.
    """

    def whole(height: int, width: int) -> Views:
        return Views.whole(*smart_resize(height, width, block, min_pixels, max_pixels), block)

    return frames_of(image, whole)[0][0]


def frames_of(image: ImageLike, views_of: Callable[[int, int], Views]) -> tuple[list[np.ndarray], Views]:
    """The pictures that a model's views are cut from, uint8 [H, W, 3] each, and how it looks at them.

    ``views_of``: height and width of an image -> how it is shown. Raises as ``prepare``.
    """
    with contextlib.ExitStack() as stack:
        found = _opened(image)
        source = stack.enter_context(found) if isinstance(found, Page) else found
        width, height = source.size
        try:
            shown = views_of(height, width)
        except ImageError as err:
            raise ImageError(
                f"{image!s:.200}: {err}" if isinstance(image, (str, os.PathLike)) else str(err)
            ) from err
        return [framed(_at(source, frame), frame) for frame in shown.frames], shown


def _at(source: Image.Image | Page, frame: Frame) -> Image.Image:
    """An image as it is, a page of a document drawn at the size that a frame asks for."""
    if isinstance(source, Image.Image):
        return source
    return source.draw(*source.size) if frame.square else source.draw(frame.width, frame.height)


def framed(source: Image.Image, frame: Frame) -> np.ndarray:
    """One picture of an image: uint8 [H, W, 3], contiguous."""
    width, height = source.size
    if frame.square and width != height:
        side = max(width, height)
        middle = Image.new("RGB", (side, side), frame.fill)
        middle.paste(source, ((side - width) // 2, (side - height) // 2))
        source = middle
    if source.size != (frame.width, frame.height):
        source = source.resize((frame.width, frame.height), Image.Resampling.BICUBIC)
    pixels = np.asarray(source)
    if frame.box is None:
        return np.ascontiguousarray(pixels)
    top, left, H, W = frame.box
    found = np.zeros((H, W, 3), np.uint8)
    part = pixels[max(top, 0) : max(top + H, 0), max(left, 0) : max(left + W, 0)]
    y = max(-top, 0)
    x = max(-left, 0)
    found[y : y + part.shape[0], x : x + part.shape[1]] = part
    return found


def cut(frames: Sequence[np.ndarray], view: View) -> np.ndarray:
    """What a view shows of the pictures of an image: uint8 [H, W, 3], contiguous."""
    top, left, height, width = view.box
    return np.ascontiguousarray(frames[view.frame][top : top + height, left : left + width])


def read(image: ImageLike) -> Image.Image:
    """An RGB PIL image from a path, the bytes of a file, a PIL image or a uint8 array [H, W, 3] or [H, W].

    Of a PDF the page that is named (pdf.py), at a usual size.
    """
    found = _opened(image)
    if isinstance(found, Image.Image):
        return found
    with found as page:
        return page.draw(*page.size)


def _opened(image: ImageLike) -> Image.Image | Page:
    """An image as read, or the page of a PDF that it is."""
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the image")
    if isinstance(image, bytes):
        return _from_file(image, "the image", None)
    if not isinstance(image, (str, os.PathLike)):
        raise RequestError(
            f"an image is a {type(image).__name__}, expected a path, the bytes of a file, a PIL image or a uint8 array"
        )
    name = page_name(image)
    if name is not None and name.first < name.last:
        raise ImageError(f"{image!s:.200}: names several pages, expected one here")
    place = image if name is None else name.document
    number = None if name is None else name.first
    if isinstance(place, str) and (scheme := SCHEME.match(place)):
        kind = (scheme[1] or scheme[2]).lower()
        if kind != "file":
            return _from_file(_data_of(place, kind), f"{place[:40]}...", number)
        place = url2pathname(urlsplit(place).path)
    path = Path(place)
    return _from_file(_file_bytes(path), f"{path!s:.200}", number)


def _from_file(data: bytes, name: str, number: int | None) -> Image.Image | Page:
    """Of the bytes of a file; ``number``: of the page that was asked for, counted from 1."""
    if is_pdf(data):
        return Page(data, number or 1, name if number is None else f"{name}#{number}")
    if number is not None:
        raise ImageError(f"{name}#{number}: names a page of what is no PDF, expected a PDF")
    return _decode(data, name)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise RequestError(
            f"an image array has dtype {array.dtype} and shape {array.shape}, expected uint8 [H, W, 3] or [H, W]"
        )
    if 0 in array.shape:
        raise ImageError(
            f"an image array has shape {array.shape}, expected at least {MIN_SIDE} pixels on each side"
        )
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "the image")


def _data_of(url: str, scheme: str) -> bytes:
    """The bytes in a ``data:`` URL. Raises ImageError for other URLs: nothing is fetched."""
    if scheme != "data":
        raise ImageError(f"{url:.200}: is a URL, expected a file; nothing is fetched: download it first")
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError(f"{url:.40}...: expected a URL of the form data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as err:
        raise ImageError(f"{url:.40}...: is not valid base64 ({err})") from err


def _file_bytes(path: Path) -> bytes:
    try:
        if not path.exists():
            hint = "; is it base64? put data:image/png;base64, before it" if len(str(path)) > 1000 else ""
            raise ImageError(f"{path!s:.200}: no such file{hint}")
        if not path.is_file():
            raise ImageError(f"{path}: is not a file, expected an image file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ImageError(f"{path}: has {size} bytes, expected at most {MAX_FILE_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as err:
        if len(str(path)) > 1000:
            raise ImageError(
                f"{path!s:.60}...: is no path; if it is base64, put data:image/png;base64, before it"
            ) from err
        raise ImageError(f"{path}: cannot be read: {err}") from err


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ImageError(f"{name}: is empty (0 bytes), expected an image file")
    try:
        with WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as err:
        raise ImageError(
            f"{name}: has more pixels than a file may, expected at most {MAX_SOURCE_PIXELS} pixels; scale it down first"
        ) from err
    except UnidentifiedImageError as err:
        raise ImageError(
            f"{name}: is not an image that Pillow can read, expected PNG, JPEG, WebP, ..."
        ) from err
    except Exception as err:  # damaged files raise nearly anything in Pillow's decoders
        raise ImageError(f"{name}: cannot be opened: {err}") from err
    return _to_rgb(image, name)


@functools.cache
def _quiet_libtiff() -> None:
    """Take away libtiff's handlers of messages, which write to the process's standard error.

    What is wrong with a file becomes an exception anyway. Where the library is not found (not Linux), they stay.
    """
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for file in {line.split()[-1] for line in mapped if "libtiff" in line}:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(file)
            for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
                handler = getattr(library, name)
                handler.argtypes = [ctypes.c_void_p]
                handler.restype = ctypes.c_void_p
                handler(None)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The current frame (of a file: the first), upright, 8 bits per channel, opaque, RGB."""
    width, height = image.size
    if width * height > MAX_SOURCE_PIXELS:
        raise ImageError(
            f"{name}: has {width} x {height} pixels, expected at most {MAX_SOURCE_PIXELS}; scale it down first"
        )
    try:
        if image.format == "TIFF":
            _quiet_libtiff()
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bits(image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
            image = Image.alpha_composite(paper, layer)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as err:  # damaged files raise nearly anything in Pillow's decoders
        raise ImageError(f"{name}: cannot be decoded, it may be damaged or cut off: {err}") from err


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit (and wider) gray, 0..65535, or float gray, 0..255, scaled to 8 bits."""
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8))
    wide = np.clip(values.astype(np.int64), 0, 65535)
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
