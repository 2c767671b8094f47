"""How large values get inside a model, to decide what float16 engines must calculate in float32.

float16 ends at 65504, and the streams of vision towers and decoders exceed that in a few channels. So before an fp16
export the model runs in float32 (run_model.py) on synthetic screens, and on the images to calibrate with where there
are any, and every kind of value that comes near the end is calculated in float32 in the exported graph. bfloat16 cannot
overflow.

Kinds (``ops.watch`` in the towers): "residual", the sums that layers add to; "mlp", what is inside and comes out of an
MLP; "merger", what is inside the patch mergers. Always in float32: norms (their operators accumulate so), positions and
rotary angles. Two kinds have to be in 16 bits: "attention", queries, keys, values and what attention puts out, and
"features", what vision hands to the decoder; where those are too large, the export is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..models.config import ModelConfig, Preprocessing
from ..models.errors import CheckpointError
from ..models.family import View
from ..models.progress import Progress
from .checkpoint import Checkpoint
from .lowering import ops
from .run_model import Asked, EagerModel, Look, Sample, joined

LIMIT = 65504 / 8  # room for pictures that excite the model more than the ones tried here
ALWAYS = ("norm", "positions")
NARROW = ("attention", "features")
ALL = ("everything",)  # of graphs that calculate in float32 anyway
TEXT = 32  # tokens after the screens


def float32_kinds(
    checkpoint: Checkpoint,
    pre: Preprocessing,
    precision: str,
    screens: np.ndarray,
    progress: Progress,
    samples: Sequence[Sample] = (),
) -> dict[str, tuple[str, ...]]:
    """Graph -> the kinds of values to calculate in float32, for graphs that calculate in ``precision``.

    ``screens`` uint8 [H, W, 3]: what is tried on every model; ``samples``: a user's images, which are tried, too.
    Raises CheckpointError for weights that cannot be read, and for a model that float16 cannot calculate.
    """
    with_weights = checkpoint.config.with_weights
    if precision == "fp32":
        return dict.fromkeys(with_weights, ALL)
    found: dict[str, set[str]] = {graph: set() for graph in with_weights}
    if precision == "fp16":
        tried = "synthetic screens" if checkpoint.config.sees else "a few words"
        tried += f" and {len(samples)} images" if samples else ""
        largest = measure(checkpoint, pre, screens, progress, samples)
        for graph in with_weights:
            kinds = largest[graph]
            found[graph] = {kind for kind, value in kinds.items() if not value < LIMIT}
            for kind in sorted(found[graph] & set(NARROW)):
                raise CheckpointError(
                    f"{graph}: {kind} reaches {kinds[kind]:.0f} on {tried}, expected under {LIMIT:.0f} for "
                    "float16 (which ends at 65504); build with --precision bf16"
                )
            if "mlp" in found[graph]:
                found[graph].add("residual")  # which it is added to
    return {graph: (*ALWAYS, *sorted(kinds)) for graph, kinds in found.items()}


def measure(
    checkpoint: Checkpoint,
    pre: Preprocessing,
    screens: np.ndarray,
    progress: Progress,
    samples: Sequence[Sample] = (),
) -> dict[str, dict[str, float]]:
    """Graph -> kind -> the largest magnitude found, on ``screens`` and on ``samples``."""
    largest: dict[str, dict[str, float]] = {"vision": defaultdict(float), "language": defaultdict(float)}
    graph = "vision"

    def watcher(kind: str, x: Tensor) -> None:
        largest[graph][kind] = max(largest[graph][kind], float(x.abs().max()))

    model = EagerModel(checkpoint, pre, "check numbers", progress)
    with ops.watching(watcher):
        own = _screens_and_text if checkpoint.config.sees else _only_text
        for tried in (own(checkpoint.config, screens), *samples):
            graph = "vision"
            asked = model.asked(tried)
            graph = "language"
            model.decode(asked)
    return {name: dict(kinds) for name, kinds in largest.items()}


def _only_text(config: ModelConfig, image: np.ndarray) -> Sample:
    """For a model that takes no image."""
    none = np.zeros((1, 1, config.text.width), np.float32)
    places = np.arange(TEXT, dtype=np.int32)
    positions = np.tile(places, (config.axes, 1))
    return Sample((), lambda seen: Asked(_text(config), np.full(TEXT, -1, np.int32), positions, none))


def _text(config: ModelConfig) -> np.ndarray:
    """Token ids int32 [TEXT] from all over the vocabulary."""
    return np.arange(TEXT, dtype=np.int32) * max(1, config.text.vocab // (TEXT + 1))


def _screens_and_text(config: ModelConfig, image: np.ndarray) -> Sample:
    """Synthetic screens, of which everything is kept, and some text."""
    c = config.vision
    if c.side:  # their upper left part, over and over where that is smaller
        rows, columns = (np.arange(c.side) % n for n in image.shape[:2])
        image = np.ascontiguousarray(image[rows][:, columns])
    height, width = image.shape[:2]
    view = View((0, 0, height, width), (height // c.block, width // c.block))
    K = view.total
    keep = np.arange(K, dtype=np.int32)
    positions = np.tile(np.arange(K + TEXT, dtype=np.int32), (config.axes, 1))
    ids = np.concatenate([np.zeros(K, np.int32), _text(config)])
    rows = np.concatenate([keep, np.full(TEXT, -1, np.int32)])

    def lay_out(seen: Sequence[dict[str, np.ndarray]]) -> Asked:
        features = joined([each["features"] for each in seen], seen)
        return Asked(ids, rows, positions, features)

    return Sample((Look(image, view, keep),), lay_out)
