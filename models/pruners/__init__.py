"""How to prune, as data: a settings class for each pruner, in a file named as the one with its graphs.

A pruner looks at the image, before the vision tower, or at the features, after it. Settings are a property of a
request; a bundle carries those of requests that do not say. A further pruner is a file here, one of the same name in
exporters/pruners, and a line in the table of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

from ..errors import RequestError
from .pixelprune import PixelPrune
from .prunesid import PruneSID


class Pruner(Protocol):
    """Frozen settings of one pruner; a dataclass with plain values. Raises RequestError for impossible ones."""

    name: ClassVar[str]  # of its file
    after: ClassVar[Literal["image", "vision"]]

    @property
    def graph(self) -> str:
        """Which of its graphs runs, such as "pixelprune.pred_2d.max"."""

    def inputs(self, block: int) -> Mapping[str, int | range]:
        """Inputs of that graph besides the image or the features, by name, a number or several as int32 [n].

        Tokens have ``block`` x ``block`` pixels.
        """

    def idle(self, tokens: int) -> str:
        """Why it would drop none of so many tokens, "" where it may. Raises RequestError for more than it takes."""


PRUNERS: dict[str, type[Any]] = {pruner.name: pruner for pruner in (PixelPrune, PruneSID)}


@dataclass(frozen=True)
class PruneSetting:
    """A pruner as bundle.json has it."""

    pruner: str  # a key of PRUNERS
    settings: dict[str, bool | int | float | str | None]


def settings_of(pruners: Iterable[Pruner]) -> tuple[PruneSetting, ...]:
    """For bundle.json."""
    return tuple(PruneSetting(pruner.name, asdict(pruner)) for pruner in pruners)  # type: ignore[call-overload]


def pruners_of(settings: Iterable[PruneSetting]) -> tuple[Pruner, ...]:
    """From bundle.json. Raises RequestError for a pruner or a setting that there is none of."""
    found: list[Pruner] = []
    for setting in settings:
        if setting.pruner not in PRUNERS:
            raise RequestError(
                f"found the pruner {setting.pruner!r}, expected one of: {', '.join(sorted(PRUNERS))}"
            )
        try:
            found.append(PRUNERS[setting.pruner](**setting.settings))
        except TypeError as err:
            raise RequestError(f"{setting.pruner}: {err}") from err
    return tuple(found)


def changed(pruners: Iterable[Pruner], settings: Mapping[str, Any]) -> tuple[Pruner, ...]:
    """The same pruners with some settings of PixelPrune changed; it is added where it is not among them."""
    found = list(pruners)
    at = next((i for i, pruner in enumerate(found) if isinstance(pruner, PixelPrune)), None)
    if at is None:
        return (PixelPrune(**settings), *found)
    found[at] = PixelPrune(**{**asdict(found[at]), **settings})  # type: ignore[call-overload]
    return tuple(found)


def with_budget(pruners: Iterable[Pruner], max_tokens: int, **settings: Any) -> tuple[Pruner, ...]:
    """The same pruners with PruneSID at a budget of so many tokens an image; it is added where it is not among them.

    ``settings``: further ones of PruneSID.
    """
    found = list(pruners)
    at = next((i for i, pruner in enumerate(found) if isinstance(pruner, PruneSID)), None)
    if at is None:
        return (*found, PruneSID(max_tokens, **settings))
    found[at] = replace(found[at], max_tokens=max_tokens, **settings)  # type: ignore[type-var]
    return tuple(found)


def listed(prune: object, also: str = "") -> tuple[Pruner, ...]:
    """What a request names as its pruners: one, a list of them, or None for none, as a tuple.

    Raises RequestError for anything else (``also``: what else the caller takes), and for two of the same kind.
    """
    if prune is None:
        return ()
    several: list[Any] = list(prune) if isinstance(prune, (list, tuple)) else [prune]
    for pruner in several:
        if type(pruner) not in PRUNERS.values():
            raise RequestError(
                f"prune is {prune!r:.80}, expected ppexport.PixelPrune(...) or PruneSID(...), a list of pruners, None "
                f"(off){also}"
            )
    names = [pruner.name for pruner in several]
    if len(set(names)) < len(names):
        raise RequestError(f"prune names the pruners {', '.join(names)}, expected each of them once")
    return tuple(several)


def of_family(pruners: Iterable[Pruner], class_token: bool) -> tuple[Pruner, ...]:
    """The same pruners with what "auto" stands for in a model. ``class_token``: does its tower score with one?"""
    variant = "llava" if class_token else "qwen"
    return tuple(
        replace(pruner, variant=variant)  # type: ignore[type-var]
        if isinstance(pruner, PruneSID) and pruner.variant == "auto"
        else pruner
        for pruner in pruners
    )
