"""Images: parity with transformers' PIL processor, every pixel format, and every kind of bad file."""

from __future__ import annotations

import io
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import IMAGES
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

import ppexport
from ppexport.runtime import image as images
from ppexport.runtime.image import read


@pytest.mark.parametrize("name", sorted(p.name for p in IMAGES.iterdir()))
@pytest.mark.parametrize("max_pixels", [200_000, 600_000, 16_777_216])
def test_pixels_equal_transformers(name: str, max_pixels: int) -> None:
    """Our uint8 pixels, normalised and patchified by their code, are their pixel_values: bit for bit."""
    limits = {"shortest_edge": 65536, "longest_edge": max_pixels}
    processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=limits)
    theirs = processor(Image.open(IMAGES / name), return_tensors="np")
    ours = images.prepare(IMAGES / name, 32, 65536, max_pixels)
    _, h, w = theirs["image_grid_thw"][0]
    assert ours.shape == (h * 16, w * 16, 3)
    again = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, do_resize=False)(ours, return_tensors="np")
    np.testing.assert_array_equal(again["pixel_values"], theirs["pixel_values"])


def test_smart_resize_equals_transformers() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(n) for n in rng.integers(2, 3000, 2))
        if max(height, width) / min(height, width) > 200:
            continue
        low, high = sorted(int(n) for n in rng.integers(1024, 4_000_000, 2))
        assert images.smart_resize(height, width, 32, low, high) == smart_resize(height, width, 32, low, high)


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def gradient() -> np.ndarray:
    return np.add.outer(np.arange(64) * 2, np.arange(64)).clip(0, 255).astype(np.uint8)


def test_grayscale_palette_and_one_bit() -> None:
    gray = gradient()
    np.testing.assert_array_equal(np.asarray(images.read(saved(Image.fromarray(gray))))[:, :, 1], gray)
    colour = Image.fromarray(np.stack([gray, gray // 2, gray // 4], 2)).quantize(64)
    np.testing.assert_array_equal(np.asarray(images.read(saved(colour))), np.asarray(colour.convert("RGB")))
    bits = Image.fromarray(gray > 90)
    assert set(np.unique(np.asarray(images.read(saved(bits))))) == {0, 255}


def test_transparent_pixels_are_put_on_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (10, 20, 30, 255)
    result = np.asarray(images.read(saved(Image.fromarray(pixels, "RGBA"))))
    assert (result[:4] == (10, 20, 30)).all()
    assert (result[4:] == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    result = np.asarray(images.read(saved(palette, transparency=1)))
    assert (result == 255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    wide = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    result = np.asarray(images.read(saved(Image.fromarray(wide))))[:, :, 0]
    np.testing.assert_array_equal(result, np.round(wide / 257).astype(np.uint8))
    assert result.min() == 0
    assert result.max() == 255


def test_cmyk() -> None:
    cmyk = Image.fromarray(np.stack([gradient()] * 4, 2), "CMYK")
    result = images.read(saved(cmyk, "TIFF"))
    np.testing.assert_array_equal(np.asarray(result), np.asarray(cmyk.convert("RGB")))


def test_exif_rotation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    picture = Image.fromarray(np.repeat(gradient()[:32, :, None], 3, 2))
    result = images.read(saved(picture, exif=exif))
    assert result.size == (32, 64)
    np.testing.assert_array_equal(np.asarray(result), np.rot90(np.asarray(picture), -1))


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(images.read(animated))[5, 5].tolist() == [255, 0, 0]


def test_arrays_and_pil_images_and_bytes_give_the_same() -> None:
    path = IMAGES / "web_gnuplot.png"
    picture = Image.open(path).convert("RGB")
    expected = ppexport.select(path).keep
    for image in (str(path), path.read_bytes(), picture, np.asarray(picture)):
        np.testing.assert_array_equal(ppexport.select(image).keep, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"bad.png: no such file"),
        (b"", r"bad.png: is empty \(0 bytes\)"),
        (b"%PDF-1.7 hello", r"bad.png: cannot be opened .*expected a PDF with pages"),
        (
            (IMAGES / "gui_mousepad.png").read_bytes()[:9000],
            r"bad.png: cannot be decoded, it may be damaged or cut off",
        ),
        ((IMAGES / "gui_mousepad.png").read_bytes()[:20], r"bad.png: (is not an image|cannot be opened)"),
        (saved(Image.new("RGB", (1, 1))), r"the image is 1 x 1 pixels, expected at least 2 on each side"),
        (
            saved(Image.new("RGB", (4000, 10))),
            r"4000 x 10 pixels, an aspect ratio of 400, expected at most 200",
        ),
        (
            saved(Image.new("1", (20000, 20000))),
            r"has more pixels than a file may, expected at most 100000000",
        ),
        (saved(Image.new("1", (11000, 11000))), r"11000 x 11000 pixels, expected at most 100000000"),
    ],
    ids=["missing", "empty", "pdf", "truncated", "header", "1x1", "aspect", "bomb", "large"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ppexport.ImageError, match=message):
        ppexport.select(path)


def test_directory_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(ppexport.ImageError, match="is not a file"):
        ppexport.select(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), r"dtype float32 and shape \(64, 64, 3\), expected uint8"),
        (np.zeros((3, 64, 64), np.uint8), r"shape \(3, 64, 64\), expected uint8 \[H, W, 3\]"),
        (np.zeros((2, 64, 64, 3), np.uint8), r"expected uint8 \[H, W, 3\]"),
        (object(), "an image is a object, expected a path"),
    ],
)
def test_wrong_dtype_or_shape(array: object, message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        ppexport.select(array)  # type: ignore[arg-type]


def test_empty_array() -> None:
    with pytest.raises(ppexport.ImageError, match="expected at least 2 pixels"):
        ppexport.select(np.zeros((0, 10, 3), np.uint8))


@pytest.mark.parametrize("limits", [(0, 100000), (100, 50), (1, 100)])
def test_impossible_pixel_limits(limits: tuple[int, int], screen: np.ndarray) -> None:
    with pytest.raises(ppexport.RequestError, match=f"min_pixels is {limits[0]}"):
        ppexport.select(screen, min_pixels=limits[0], max_pixels=limits[1])


def test_a_decoder_that_complains_by_itself_is_not_heard(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """libtiff writes "Using code not yet in table" to standard error; what is wrong is in the error."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "whole.tif").read_bytes())
    data[200:260] = b"\xff" * 60
    (tmp_path / "damaged.tif").write_bytes(bytes(data))
    with pytest.raises(
        ppexport.ImageError, match=r"damaged.tif: cannot be decoded, it may be damaged or cut off"
    ):
        read(tmp_path / "damaged.tif")
    assert capfd.readouterr() == ("", "")


def test_reading_in_threads_leaves_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    """They belong to the whole process, which is somebody else's."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: read(data), range(600)))
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


@pytest.mark.parametrize("url", ["https://example.org/a.png", "HTTP://x/y.jpg", "s3://b/a.png"])
def test_urls_are_told_that_nothing_is_fetched(url: str) -> None:
    with pytest.raises(
        ppexport.ImageError, match="is a URL, expected a file; nothing is fetched: download it first"
    ):
        read(url)
