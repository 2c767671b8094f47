"""PixelPrune: tokens that their neighbours predict are dropped before the vision tower. Settings; the graphs are in
exporters/pruners/pixelprune.py, how they are run in runtime/selector.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..checks import integer, number
from ..errors import RequestError

SELECTOR_BLOCKS = (14, 28, 32)  # pixels per merged-token side for which selector graphs ship with the package
PREDICTORS = ("pred_2d", "raster", "serpentine")
PRUNE_METRICS = ("max", "mae", "rmse")
PRUNE_METHODS = (*PREDICTORS, "unique", "conncomp", "random")  # random needs no graph of its own
MOST_SEED = 2**31 - 2  # of the baselines
# (method, metric) of every pruning graph; unique knows equal and not equal only
PRUNE_GRAPHS = (*((m, d) for m in (*PREDICTORS, "conncomp") for d in PRUNE_METRICS), ("unique", "max"))


def graph_name(method: str, metric: str) -> str:
    """The name of the graph of a method and a metric."""
    return f"pixelprune.{method}.{metric}"


def prune_file(graph: str, byte_max: bool = True) -> str:
    """The file of a graph that prunes, in a bundle and in the package.

    Graphs on bytes for ONNX Runtime come in two forms with equal results: one with Max and Min on bytes (``byte_max``),
    which it has from 1.24 on, and one without, for older ones.
    """
    return f"{graph}{'' if byte_max else '.no_byte_max'}.onnx"


@dataclass(frozen=True)
class PixelPrune:
    """Drop the tokens of an image that repeat what predicts them.

    Source: PixelPrune (OPPO-Mente-Lab). tau is the distance up to which two tokens still count as equal, as a share of
    255: 0 drops exact repetitions only. Raises RequestError for values out of range.
    """

    name: ClassVar[str] = "pixelprune"
    after: ClassVar[Literal["image", "vision"]] = "image"

    # "pred_2d": prediction from the left, upper and upper-left neighbour; "raster", "serpentine": from the token before
    # it in that scan; "unique": the first of all equal tokens, anywhere. Baselines to measure accuracy against, which
    # keep as many as pred_2d: "random", and "conncomp" (about as many): an even share of every connected component
    method: str = "pred_2d"
    metric: str = (
        "max"  # distance: the largest difference of a byte, their mean ("mae") or root mean square ("rmse")
    )
    tau: float = 0.0  # 0 ... 1
    anchored: bool = (
        True  # compare with the reconstruction, so errors cannot add up; False: with the raw neighbour
    )
    max_tokens: int | None = None  # of an image: raise tau to the smallest that keeps no more (selector.py)
    seed: int = 0  # of the baselines

    def __post_init__(self) -> None:
        plain = {"tau": number("tau", self.tau, "a number from 0 to 1", 0, 1)}
        plain["seed"] = integer("seed", self.seed, 0, MOST_SEED)
        if self.max_tokens is not None:
            plain["max_tokens"] = integer("max_tokens", self.max_tokens, 1)
        for name, value in plain.items():  # of numpy's types, too
            object.__setattr__(self, name, value)
        if not isinstance(self.anchored, bool):
            raise RequestError(f"anchored is {self.anchored!r}, expected True or False")
        if not isinstance(self.method, str) or self.method not in PRUNE_METHODS:
            raise RequestError(f"method is {self.method!r}, expected one of: {', '.join(PRUNE_METHODS)}")
        if not isinstance(self.metric, str) or self.metric not in PRUNE_METRICS:
            raise RequestError(f"metric is {self.metric!r}, expected one of: {', '.join(PRUNE_METRICS)}")
        if self.method == "unique" and (self.metric, self.tau, self.anchored) != ("max", 0, True):
            raise RequestError(
                f"method 'unique' has metric {self.metric!r}, tau {self.tau:g} and anchored {self.anchored}, expected "
                "'max', 0 and True: it drops copies only"
            )
        if self.max_tokens is not None and self.method not in PREDICTORS:
            raise RequestError(f"max_tokens goes with {', '.join(PREDICTORS)}, found method {self.method!r}")

    @property
    def graph(self) -> str:
        """See Pruner; "random" has none of its own, and runs that of pred_2d, which says how many to keep."""
        return graph_name("pred_2d" if self.method == "random" else self.method, self.metric)

    def inputs(self, block: int) -> dict[str, int]:
        """See Pruner."""
        return {
            "threshold": self.threshold(block),
            "anchored": int(self.anchored),
            "seed": self.seed,
            "target": 0,
        }

    def idle(self, tokens: int) -> str:
        """See Pruner; that shows in the pixels."""
        return ""

    def threshold(self, block: int) -> int:
        """The largest distance that counts as equal, as the graphs take it (exporters/pruners/metrics.py).

        For tokens of ``block`` x ``block`` pixels: the largest difference of a byte, the sum of all differences, or the
        sum of their squares.
        """
        count = 3 * block**2
        level = 255 * self.tau
        return int({"max": level, "mae": level * count, "rmse": level**2 * count}[self.metric] + 1e-6)
