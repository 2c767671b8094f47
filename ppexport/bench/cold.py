"""A new process: load a bundle, generate one token, print the milliseconds since it was started."""

from __future__ import annotations

import json
import sys
import time


def main(given: dict) -> float:  # type: ignore[type-arg]
    """``given``: fields of measure.Plan, and bundle, image, prompt, and ``started``, seconds of time.time."""
    from ..calibration import prompt_ids
    from ..models.pruners import changed
    from ..runtime.pipeline import load

    sizes = (given["min_pixels"], given["max_pixels"])
    pipe = load(given["bundle"], given["device"], *sizes, given["threads"], reuse=0)
    tau = given["taus"][0]
    prune = None if tau is None else changed(pipe.prune, {"tau": tau})
    if pipe.text is not None:
        pipe.generate(given["prompt"], [given["image"]], prune, max_new_tokens=1).text()
    else:
        total = pipe.pixels(given["image"])[1].placeholders
        next(
            pipe.generate_tokens(prompt_ids(None, pipe.manifest.model, "", [total]), [given["image"]], prune)
        )
    return (time.time() - given["started"]) * 1e3


def run() -> None:
    """The argument is ``given`` in JSON. An error that the user can cause is a line on stderr."""
    from ..models.errors import PpexportError

    try:
        print(main(json.loads(sys.argv[1])))
    except PpexportError as err:
        sys.exit(str(err))
