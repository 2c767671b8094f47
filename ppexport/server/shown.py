"""A selection as the page draws it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..overlay import kinds
from ..runtime.image import ImageLike, read
from ..runtime.prune import Selection


def shown(image: ImageLike, selections: Sequence[Selection]) -> dict[str, Any]:
    """How many tokens are kept, and of each view its place, its grid and the kind of every block (overlay.py)."""
    source = read(image)
    width, height = source.size
    views = []
    for selection, kind in zip(selections, kinds(source, selections), strict=True):
        top, left = selection.view.box[:2] if selection.view is not None else (0, 0)
        views.append(
            {
                "left": left,
                "top": top,
                "width": selection.width,
                "height": selection.height,
                "cols": selection.cols,
                "kinds": kind.reshape(-1).tolist(),
                "of_image": _part(selection, width, height),
            }
        )
    return {
        "kept": sum(selection.kept for selection in selections),
        "total": sum(selection.total for selection in selections),
        "reason": selections[0].reason,
        "views": views,
    }


def _part(selection: Selection, width: int, height: int) -> list[float]:
    """Left, top, width and height of what a view shows of an image of that size, as shares of its sides.

    They go beyond 0 to 1 where something was put around the image.
    """
    frame = selection.frame
    view = selection.view
    if frame is None or view is None:
        return [0.0, 0.0, 1.0, 1.0]
    top, left, high, wide = view.box
    if frame.box is not None:
        top += frame.box[0]
        left += frame.box[1]
    x, y = left / frame.width, top / frame.height
    w, h = wide / frame.width, high / frame.height
    if frame.square:  # the shares are of a square around the image
        side = max(width, height)
        x = (x * side - (side - width) / 2) / width
        y = (y * side - (side - height) / 2) / height
        w *= side / width
        h *= side / height
    return [x, y, w, h]
