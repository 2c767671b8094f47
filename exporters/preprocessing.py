"""How a checkpoint's image processor prepares images, as numbers."""

from __future__ import annotations

from typing import Any

from ..models.config import Preprocessing
from ..models.hfconfig import Reader, defaults_of
from .checkpoint import Checkpoint

# Keys of an image processor that do not change what the model sees.
_HARMLESS = (
    "image_processor_type processor_class data_format input_data_format device return_tensors disable_grouping "
    "default_to_square do_convert_rgb crop_size pad_size image_seq_length"
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
    if raw is None:
        notices.append(
            "no preprocessor_config.json and no image processor in processor_config.json: using the family's "
            f"{default.min_pixels} to {default.max_pixels} pixels"
        )
        return default
    known = defaults_of(checkpoint.config.family, "preprocessor_config.json")
    r = Reader(raw, where, notices, known, _HARMLESS.split())
    vision = checkpoint.config.vision
    for key, wanted in (
        ("patch_size", vision.patch),
        ("merge_size", vision.merge),
        ("temporal_patch_size", vision.temporal_patch),
        ("resample", 3),  # bicubic
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
    ):
        if key.endswith("_size"):
            if (side := r.side(key, wanted)) != wanted:
                r.fail(f"'{key}' is {side}, expected {wanted}, as in config.json")
        else:
            r.expect(key, wanted, default=wanted)
    if abs(r.get("rescale_factor", float, 1 / 255) * 255 - 1) > 1e-6:
        r.fail(f"rescale_factor is {raw['rescale_factor']}, expected 1/255")
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
    mean = r.triple("image_mean")
    std = r.triple("image_std")
    if min(std) <= 0:
        r.fail(f"image_std is {list(std)}, expected numbers over 0")
    r.finish()
    return Preprocessing(min_pixels=low, max_pixels=high, mean=mean, std=std)
