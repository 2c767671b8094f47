"""How the reference prepares images, as published checkpoints configure it; needs transformers 4.57.6."""

from transformers import Qwen2VLImageProcessor


def reference_processor() -> Qwen2VLImageProcessor:
    """The processor of Qwen3-VL."""
    return Qwen2VLImageProcessor(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=65536,
        max_pixels=16777216,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
