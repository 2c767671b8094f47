"""How a checkpoint's image processor prepares images, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..models.config import Preprocessing
from ..models.hfconfig import Reader, defaults_of
from ..models.llava_next import pairs
from .checkpoint import Checkpoint

# Keys of an image processor that do not change what the model sees.
_HARMLESS = (
    "image_processor_type processor_class data_format input_data_format device return_tensors disable_grouping "
    "default_to_square do_convert_rgb pad_size image_seq_length"
)


def _image_processor(checkpoint: Checkpoint) -> tuple[str, dict[str, Any] | None]:
    """Where the image processor's configuration lies, and what it says; as transformers, processor_config.json first.

    transformers 5 saves it in there, 4 in a file of its own.
    """
    nested = (checkpoint.optional_json("processor_config.json") or {}).get("image_processor")
    if nested is not None:
        return "processor_config.json: image_processor", nested
    return "preprocessor_config.json", checkpoint.optional_json("preprocessor_config.json")


def preprocessing_of(checkpoint: Checkpoint, notices: list[str]) -> Preprocessing:
    """Image numbers of the image processor's configuration, or the family's where it is absent."""
    where, raw = _image_processor(checkpoint)
    default: Preprocessing = checkpoint.family.preprocessing
    side = checkpoint.config.vision.side
    if not checkpoint.config.sees:
        return default
    if side:
        edge = default.shortest_edge and side
        default = replace(default, min_pixels=side**2, max_pixels=side**2, shortest_edge=edge)
    if raw is None:
        size = f"views of {side} x {side}" if side else f"{default.min_pixels} to {default.max_pixels}"
        notices.append(
            "no preprocessor_config.json and no image processor in processor_config.json: using the family's "
            f"{size} pixels"
        )
        return default
    known = defaults_of(checkpoint.config.family, "preprocessor_config.json")
    r = Reader(raw, where, notices, known, _HARMLESS.split())
    for key, wanted in (("resample", 3), ("do_resize", True), ("do_rescale", True), ("do_normalize", True)):
        r.expect(key, wanted, default=wanted)  # 3: bicubic
    if abs(r.get("rescale_factor", float, 1 / 255) * 255 - 1) > 1e-6:
        r.fail(f"rescale_factor is {raw['rescale_factor']}, expected 1/255")
    sizes = _one_size(r, checkpoint) if side else _any_size(r, checkpoint)
    mean = r.triple("image_mean")
    std = r.triple("image_std")
    if min(std) <= 0:
        r.fail(f"image_std is {list(std)}, expected numbers over 0")
    r.finish()
    return replace(sizes, mean=mean, std=std)


def _any_size(r: Reader, checkpoint: Checkpoint) -> Preprocessing:
    """Of towers that take images of any size, within limits to their pixels."""
    vision = checkpoint.config.vision
    default: Preprocessing = checkpoint.family.preprocessing
    for key, wanted in (
        ("patch_size", vision.patch),
        ("merge_size", vision.merge),
        ("temporal_patch_size", vision.temporal_patch),
    ):
        if (side := r.side(key, wanted)) != wanted:
            r.fail(f"'{key}' is {side}, expected {wanted}, as in config.json")
    r.get("crop_size", Mapping, None)
    for key in ("do_center_crop", "do_pad"):
        r.expect(key, False, default=False)
    size = r.section("size")
    low = size.get("shortest_edge", int, default.min_pixels)
    high = size.get("longest_edge", int, default.max_pixels)
    for key in ("min_pixels", "max_pixels"):  # 4.45 to 4.48 wrote them in both places
        if r.get(key, int, None) is not None:
            size.get(key, int, None)
    size.finish()
    low = r.get("min_pixels", int, low)
    high = r.get("max_pixels", int, high)
    if low > high or high < vision.block**2:
        r.fail(
            f"{low} to {high} pixels, expected a rising range that holds one {vision.block} x {vision.block} block"
        )
    return replace(default, min_pixels=low, max_pixels=high)


def _one_size(r: Reader, checkpoint: Checkpoint) -> Preprocessing:
    """Of towers with views of one size."""
    vision = checkpoint.config.vision
    side = vision.side
    tiles = bool(vision.pinpoints)
    size = r.section("size")
    edge = size.get("shortest_edge", int, 0)
    if not edge:
        size.expect("height", side)
        size.expect("width", side)
    size.finish()
    if tiles and edge not in (0, side):
        r.fail(f"size has a shortest edge of {edge}, expected {side}, as image_size in config.json")
    r.expect("do_center_crop", True, default=True)
    crop = r.section("crop_size")
    crop.expect("height", side)
    crop.expect("width", side)
    crop.finish()
    square = False
    if tiles:
        r.get("do_pad", bool, True)  # of images with fewer tiles, for a batch
        found = pairs(r, r.get("image_grid_pinpoints", list))
        if found != vision.pinpoints:
            r.fail(
                f"image_grid_pinpoints is {list(found)!r:.80}, expected {list(vision.pinpoints)!r:.80}, as in "
                "config.json"
            )
        edge = 0
    else:
        square = r.get("do_pad", bool, False)
    default: Preprocessing = checkpoint.family.preprocessing
    return replace(default, min_pixels=side**2, max_pixels=side**2, shortest_edge=edge, pad_to_square=square)
