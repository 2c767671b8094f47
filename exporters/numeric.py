"""How large values get inside a model, to decide what float16 engines must calculate in float32.

float16 ends at 65504, and the streams of vision towers and decoders exceed that in a few channels. So before an fp16
export both towers run once in float32 on synthetic screens, one layer's weights in memory at a time, and every kind of
value that comes near the end is calculated in float32 in the exported graph. bfloat16 cannot overflow.

Kinds (``ops.watch`` in the towers): "residual", the sums that layers add to; "mlp", what is inside and comes out of an
MLP; "merger", what is inside the patch mergers. Always in float32: norms (their operators accumulate so), positions and
rotary angles. Two kinds have to be in 16 bits: "attention", queries, keys, values and what attention puts out, and
"features", what vision hands to the decoder; where those are too large, the export is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.config import Preprocessing
from ..models.errors import CheckpointError
from ..models.pocket.screens import sample
from . import language, ops, vision
from .checkpoint import Checkpoint
from .streamed import streamed

LIMIT = 65504 / 8  # room for pictures that excite the model more than the ones tried here
ALWAYS = ("norm", "positions")
NARROW = ("attention", "features")
ALL = ("everything",)  # of graphs that calculate in float32 anyway
SCREENS = (("transcribe", 1), ("locate", 2), ("yesno", 3))  # skill and seed, drawn at up to 640 x 480 pixels


def wide_kinds(
    checkpoint: Checkpoint, pre: Preprocessing, precision: str, progress: Callable[[str, int, int], None]
) -> dict[str, tuple[str, ...]]:
    """Graph -> the kinds of values to calculate in float32, for graphs that calculate in ``precision``.

    Raises CheckpointError for weights that cannot be read, and for a model that float16 cannot calculate.
    """
    if precision == "fp32":
        return {"vision": ALL, "language": ALL}
    found: dict[str, set[str]] = {"vision": set(), "language": set()}
    if precision == "fp16":
        largest = measure(checkpoint, pre, progress)
        for graph, kinds in largest.items():
            found[graph] = {kind for kind, value in kinds.items() if not value < LIMIT}
            for kind in sorted(found[graph] & set(NARROW)):
                raise CheckpointError(
                    f"{graph}: {kind} reaches {kinds[kind]:.0f} on synthetic screens, expected under {LIMIT:.0f} for "
                    "float16 (which ends at 65504); build with --precision bf16"
                )
            if "mlp" in found[graph]:
                found[graph].add("residual")  # which it is added to
    return {graph: (*ALWAYS, *sorted(kinds)) for graph, kinds in found.items()}


@torch.no_grad()
def measure(
    checkpoint: Checkpoint, pre: Preprocessing, progress: Callable[[str, int, int], None]
) -> dict[str, dict[str, float]]:
    """Graph -> kind -> the largest magnitude found."""
    c = checkpoint.config
    largest: dict[str, dict[str, float]] = {"vision": defaultdict(float), "language": defaultdict(float)}
    graph = "vision"

    def watcher(kind: str, x: Tensor) -> None:
        largest[graph][kind] = max(largest[graph][kind], float(x.abs().max()))

    with torch.device("meta"):
        tower, decoder = vision.VisionTower(c.vision), language.Decoder(c.text)
    steps = c.vision.depth + c.text.layers
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("check numbers", done, steps)

    image = torch.from_numpy(_screens(c.vision.block))
    total = image.shape[0] * image.shape[1] // c.vision.block**2
    with ops.watching(watcher):
        with streamed(checkpoint, tower, "vision", "blocks", vision.constants(c.vision, pre), step):
            features = tower(image, torch.arange(total, dtype=torch.int32))
        graph = "language"
        with streamed(checkpoint, decoder, "language", "layers", language.constants(c.text), step):
            _prefill(decoder, features)
    return {name: dict(kinds) for name, kinds in largest.items()}


def _screens(block: int) -> np.ndarray:
    """The screens below each other, cut to whole blocks: uint8 [H, W, 3]."""
    images = [sample(skill, seed).image for skill, seed in SCREENS]
    width, height = (max(i.width for i in images), sum(i.height for i in images))
    canvas = Image.new("RGB", (width // block * block, height // block * block), "white")
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    return np.array(canvas)


def _prefill(decoder: language.Decoder, features: Tensor) -> None:
    """An image and some text through the decoder."""
    c, K = decoder.c, features.shape[1]
    text = torch.arange(0, 32, dtype=torch.int32) * max(1, c.vocab // 33)
    ids = torch.cat((torch.zeros(K, dtype=torch.int32), text))[None]
    rows = torch.cat((torch.arange(K, dtype=torch.int32), torch.full_like(text, -1)))[None]
    S = ids.shape[1]
    positions = torch.arange(S, dtype=torch.int32).expand(3, 1, S)
    start, at = torch.zeros(1, dtype=torch.int32), torch.full((1, 1), S - 1, dtype=torch.int32)
    caches = [torch.zeros(1, c.kv_heads, S, c.head_dim) for _ in range(2 * c.layers)]
    decoder(ids, features, rows, positions, start, at, caches)
