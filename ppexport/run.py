"""``ppexport run``: questions to a bundle, each answer as it comes, then what it took."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import click

from .inspect import check_picture, write_overlay
from .logs import EndsLine
from .models.checks import writable
from .models.errors import RequestError
from .models.manifest import FILE
from .runtime.grammar import read_schema
from .runtime.pdf import expanded, file_of
from .runtime.pipeline import REUSE, load
from .runtime.prune import Selection
from .runtime.sequence import PruneLike
from .runtime.stats import Stats
from .trace import write as write_trace

STAGES = ("image", "prune", "reuse", "text", "vision", "prefill", "decode")


def run(
    bundle: str,
    prompts: Sequence[str],
    images: Sequence[str],
    prune: Callable[[], PruneLike],
    device: str = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    threads: int = 0,
    verify: bool = False,
    no_reuse: bool = False,
    overlay: str | None = None,
    trace: str | None = None,
    as_json: bool = False,
    quiet: bool = False,
    schema: str | None = None,
    **generation: Any,
) -> None:
    """Load the bundle, stream answers to stdout, print the statistics to stderr (or all of it as JSON).

    ``prune``: asked when everything else was checked. ``schema``: a file with the JSON schema of the answers.
    """
    images = [page for image in images for page in expanded(image)]
    _check(bundle, prompts, images, overlay, trace, schema)
    prompts = [_as_utf8(prompt) for prompt in prompts]
    if schema is not None:
        generation["schema"] = read_schema(schema)
    asked: list[tuple[str, Stats]] = []
    pruners = prune()  # reads the bundle
    pipe = load(bundle, device, min_pixels, max_pixels, threads, verify, 0 if no_reuse else REUSE)
    pipe.load_pruners(pruners)
    for i, prompt in enumerate(prompts):
        answer = pipe.generate(prompt, images, pruners, **generation)
        with EndsLine() as out:
            out.open = not as_json  # an empty answer is a line, too
            for piece in answer:
                if not as_json:
                    out.write(piece)
            out.end()
        asked.append((prompt, answer.stats))
        if overlay:
            write_overlay(images[0], answer.stats.views_of(0), overlay)
            overlay = None
        if as_json:
            found = {"answer": answer.text(), "device": pipe.chosen, **as_dict(answer.stats)}
            click.echo(json.dumps(found, ensure_ascii=False))
            continue
        if not quiet:
            lines = [] if i else [f"device  {pipe.chosen}"]
            for line in [*lines, *summary(answer.stats)]:
                click.echo(line, err=True)
    if trace is not None:
        write_trace(asked, trace)


def _check(
    bundle: str,
    prompts: Sequence[str],
    images: Sequence[str],
    overlay: str | None,
    trace: str | None,
    schema: str | None,
) -> None:
    """Before anything is loaded. Raises RequestError."""
    if overlay:
        check_picture(overlay, images)
    if trace is not None:
        writable(trace, [bundle, *map(file_of, images), *([schema] if schema else [])])
    swapped = [
        prompt for prompt in prompts if os.path.isfile(os.path.join(prompt, FILE))
    ]  # a long one is no name
    if swapped and not os.path.isdir(bundle):
        raise RequestError(
            f"found {bundle!r:.80} first and the bundle {swapped[0]!r:.80} after it, expected BUNDLE PROMPT"
        )


def _as_utf8(argument: str) -> str:
    """An argument of a command line as UTF-8, also where the locale says that it is ASCII."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError:
        return argument  # told when it is encoded


def as_dict(stats: Stats) -> dict[str, Any]:
    """The statistics as plain JSON types, the images without their indices."""
    images = [view_as_dict(selection) for selection in stats.images]
    numbers = {key: value for key, value in asdict(stats).items() if key not in ("images", "spans")}
    numbers["milliseconds"] = stats.milliseconds
    return {"images": images, "kept": stats.kept, "tokens": stats.total, "ttft_ms": stats.ttft, **numbers}


def view_as_dict(selection: Selection) -> dict[str, Any]:
    """What became of a view, as plain JSON types."""
    return {
        "view": selection.number,
        "width": selection.width,
        "height": selection.height,
        "tokens": selection.total,
        "kept": selection.kept,
        "reason": selection.reason,
        "dropped": [asdict(each) for each in selection.dropped],
    }


def kept_line(selection: Selection) -> str:
    """How much is kept of a view, and why not more or less, for a person."""
    dropped = selection.dropped
    several = [f"{each.pruner} dropped {each.tokens}" for each in dropped if len(dropped) > 1]
    reasons = dict.fromkeys(filter(None, [selection.reason, *(each.reason for each in dropped)]))
    notes = [*several, *reasons]
    why = f" ({'; '.join(notes)})" if notes else ""
    of_view = f", view {selection.number + 1}" if selection.number else ""
    size = f"{selection.width} x {selection.height}{of_view}"
    return f"image   {size}: kept {selection.kept} of {selection.total} tokens, {selection.share:.1%}{why}"


def summary(stats: Stats) -> list[str]:
    """The statistics in a few lines for a person."""
    lines = [kept_line(selection) for selection in stats.images]
    pruned = stats.prompt_tokens_full - stats.prompt_tokens
    but = f"{pruned} pruned" + (f", {stats.reused_tokens} reused" if stats.reused_tokens else "")
    lines.append(
        f"prompt  {stats.prompt_tokens} tokens ({but}), answer {stats.generated_tokens}, {stats.finish}"
    )
    times = "  ".join(
        f"{name} {stats.milliseconds[name]:.1f}" for name in STAGES if name in stats.milliseconds
    )
    lines.append(f"ms      {times}  (first token after {stats.ttft:.1f})")
    return [*lines, *(f"note    {note}" for note in stats.notes)]
