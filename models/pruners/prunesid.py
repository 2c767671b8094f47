"""PruneSID: tokens are dropped after the vision tower, by what they mean. Settings; the graphs are in
exporters/pruners/prunesid.py, how they are run in runtime/prune.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..checks import integer, number
from ..errors import RequestError

GROUPS = 48  # semantic groups at most; budgets of more than four tokens for each have larger groups
MOST_DIRECTIONS = 72  # that are followed: more than groups, so that the last of these are right, too
MOST_TOKENS = 8192  # of an image: the graph compares all pairs
MOST_BUDGET = 1 << 20
VARIANTS = ("auto", "qwen", "llava")
ORDERS = ("raster", "reference")
SHARES = ("even", "information", "each")
MILLIONTHS = 1_000_000
INFORMATION = "prunesid.information"  # the graph that says how little tokens resemble each other


@dataclass(frozen=True)
class PruneSID:
    """Keep at most so many tokens of each image: a few of every semantic group, the most telling ones.

    Source: "Prune Redundancy, Preserve Essence" (PruneSID), its authors' code and paper; the same in every run, and
    what an exact decomposition gives but for a few tokens of large budgets, where theirs draws a random start. Raises
    RequestError for values out of range.
    """

    name: ClassVar[str] = "prunesid"
    after: ClassVar[Literal["image", "vision"]] = "vision"

    # of an image; nothing is dropped where there are no more. With ``dynamic`` the mean over images
    max_tokens: int
    # how tokens are scored: by their loading on the group's component ("qwen"), or by the attention that the class
    # token pays them ("llava", which counts that token in the budget). "auto": as the family has it
    variant: str = "auto"
    # of what is kept: "raster", as in the picture, or "reference", group by group as in the authors' code (where "qwen"
    # keeps more than 150, that is in the order of the picture, too)
    order: str = "raster"
    dynamic: bool = (
        False  # pictures whose tokens resemble each other less get more of the budget, others at least 16
    )
    information: float = 0.7  # what such a picture has on average: 1 - the mean cosine of its tokens
    # of an image that is shown in several views (LLaVA-NeXT's tiles), what each of them gets of the budget: "even",
    # "information" (more for those whose tokens resemble each other less), or all of it for "each", as in the paper
    share: str = "even"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_tokens", integer("max_tokens", self.max_tokens, 1, MOST_BUDGET))
        information = number("information", self.information, "a number over 0, up to 2", 1e-6, 2)
        object.__setattr__(self, "information", information)
        for what, found, expected in (
            ("variant", self.variant, VARIANTS),
            ("order", self.order, ORDERS),
            ("share", self.share, SHARES),
        ):
            if not isinstance(found, str) or found not in expected:
                raise RequestError(f"{what} is {found!r}, expected one of: {', '.join(expected)}")
        if not isinstance(self.dynamic, bool):
            raise RequestError(f"dynamic is {self.dynamic!r}, expected True or False")

    @property
    def graph(self) -> str:
        """See Pruner; "auto" is "qwen" where no family says otherwise (``models.pruners.of_family``)."""
        return f"prunesid.{'qwen' if self.variant == 'auto' else self.variant}"

    def idle(self, tokens: int) -> str:
        """See Pruner."""
        if not self.dynamic and tokens <= self.max_tokens:
            return f"{tokens} token{'s' * (tokens != 1)}, within the budget of {self.max_tokens}"
        if tokens > MOST_TOKENS:
            raise RequestError(
                f"prunesid takes up to {MOST_TOKENS} tokens of an image, found {tokens}; lower max_pixels, or prune "
                "pixels first"
            )
        return ""

    @property
    def class_tokens(self) -> bool:
        """Does the class token go before the others and count in the budget, as in the authors' code?"""
        return self.variant == "llava" and self.order == "reference"

    @property
    def directions(self) -> int:
        """How many directions of features are followed for its groups, which are a quarter of the budget."""
        groups = GROUPS if self.dynamic else min(self.max_tokens // 4 + 1, GROUPS)
        return min(groups + max(groups // 2, 12), MOST_DIRECTIONS)

    def inputs(self, block: int) -> dict[str, int | range]:
        """See Pruner. ``information``: in millionths, 0 for a fixed budget."""
        return {
            "directions": range(self.directions),
            "budget": self.max_tokens,
            "grouped": int(self.order == "reference"),
            "information": round(self.information * MILLIONTHS) if self.dynamic else 0,
        }

    def for_views(self, tokens: Sequence[int], information: Sequence[float]) -> list[PruneSID]:
        """The settings for each view of an image, with so many tokens and so much information.

        ``information`` is looked at only where ``share`` says so. Raises RequestError for a budget that has not a token
        for each.
        """
        alone = self.share == "each" or len(tokens) < 2
        least = 1 + self.class_tokens
        needed = least if alone else least * len(tokens)
        if self.max_tokens < needed:
            views = "" if len(tokens) < 2 else f": the image is shown in {len(tokens)} views"
            what = " and the class token counts" if self.class_tokens else ""
            raise RequestError(
                f"max_tokens (--prunesid) is {self.max_tokens}, expected at least {needed}{views}{what}"
            )
        if alone:
            return [self] * len(tokens)
        weights = information if self.share == "information" else [1.0] * len(tokens)
        most = [n + self.class_tokens for n in tokens]
        if self.dynamic:  # it is a mean, which a view may exceed
            most = [min(self.max_tokens, MOST_TOKENS)] * len(tokens)
        return [replace(self, max_tokens=n) for n in shared_out(self.max_tokens, weights, most, least)]


def shared_out(total: int, weights: Sequence[float], most: Sequence[int], least: int) -> list[int]:
    """``total`` in whole parts by weight, each at least ``least`` and, if there is enough elsewhere, at most ``most``.

    Ten by the weights 2, 1, 1 are 5, 3, 2; where the first holds 4 only, 4, 3, 3.
    """
    parts = [min(least, n) for n in most]
    heavy = [max(weight, 1e-9) for weight in weights]
    for _ in range(min(total, sum(most)) - sum(parts)):
        open_ones = [i for i, n in enumerate(most) if parts[i] < n]
        # the one that is farthest behind its share
        first = max(open_ones, key=lambda i: (heavy[i] / (parts[i] + 0.5), -i))
        parts[first] += 1
    return parts
