"""``ppexport verify``: what bundles compute, stage by stage on the same images, against their checkpoint in float32, or
on a device against the CPU."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from .calibration import QUESTION, prompt_ids
from .models.errors import BackendError, BundleError, RequestError
from .models.family import Prompt
from .models.manifest import Manifest, sha256
from .models.progress import Progress, silent
from .models.pruners import Pruner
from .models.pruners.prunesid import PruneSID
from .progress import Bar
from .runtime.answer import Steps
from .runtime.bundle import open_bundle
from .runtime.pdf import expanded
from .runtime.pipeline import WORTH, Pipeline, load
from .runtime.prune import Selection
from .runtime.sampling import Sampling
from .runtime.sequence import PruneLike
from .runtime.stats import Stats
from .table import aligned

if TYPE_CHECKING:
    from .exporters.run_model import Look

TOKENS = 64


@dataclass(frozen=True)
class Difference:
    """Of one stage: values that should be equal."""

    cosine: float  # the least over all tokens (rows)
    error: float  # largest difference over the largest magnitude
    bad: int  # NaN and infinite values


@dataclass(frozen=True)
class Report:
    """One bundle against what it should compute."""

    bundle: str
    precision: str
    megabytes: float
    embeds: Difference | None  # None where there is no image
    deepstack: Difference | None
    logits: Difference
    kl: float  # mean over positions, nats: of the bundle's next-token distribution from the reference's
    agreement: float  # share of greedy tokens that the reference would have chosen after the same tokens
    tokens: int  # of them
    first_token_ms: float
    tokens_per_second: float

    def problems(self, cosine: float, kl: float, agreement: float) -> list[str]:
        """What lies outside of the limits, in words.

        ``cosine`` is for features; logits are judged by what they are for, the distribution and the choice of tokens.
        """
        found = []
        for stage in ("embeds", "deepstack", "logits"):
            difference: Difference | None = getattr(self, stage)
            if difference is None:
                continue
            if difference.bad:
                found.append(f"{stage}: {difference.bad} values are NaN or infinite")
            elif stage != "logits" and not difference.cosine >= cosine:
                found.append(f"{stage}: cosine {difference.cosine:.4f}, expected at least {cosine}")
        if not self.kl <= kl:
            found.append(f"next-token distribution: KL {self.kl:.4f}, expected at most {kl}")
        if not self.agreement >= agreement:
            found.append(f"greedy tokens: {self.agreement:.1%} agree, expected at least {agreement:.1%}")
        return found


def compare(found: np.ndarray, expected: np.ndarray) -> Difference:
    """Two arrays [..., D] of one shape."""
    a, b = (x.astype(np.float64).reshape(-1, x.shape[-1]) for x in (found, expected))
    bad = int((~np.isfinite(a)).sum())
    if bad or not a.size:
        return Difference(1.0 if not a.size else float("nan"), 0.0 if not a.size else float("inf"), bad)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))
    return Difference(float(cosine.min()), float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)), 0)


def divergence(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean KL divergence of softmax(found) from softmax(expected), logits [n, V], in nats."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (expected, found))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def verify(
    bundle: str | Path,
    checkpoint: str | Path,
    images: Sequence[str],
    question: str = QUESTION,
    prune: PruneLike = "default",
    device: str = "auto",
    tokens: int = TOKENS,
    progress: Progress = silent,
    revision: str | None = None,
) -> Report:
    """Run one bundle greedily, then the checkpoint over what it was given and what it said.

    So both see the same tokens at every position, and a difference early in an answer does not hide the later ones.
    ``checkpoint``: a directory, or a name on the hub, there at ``revision`` (None: the one it was built from). Raises
    BackendError if torch is not installed, BundleError, CheckpointError, ImageError, RequestError.
    """
    try:
        from .exporters.checkpoint import Checkpoint
        from .exporters.run_model import Asked, EagerModel, joined
    except ImportError as err:
        raise BackendError(
            f"{err.name} is not installed; verify needs: pip install 'ppexport[export]'"
        ) from err
    with load(bundle, device, reuse=0) as pipe:
        reference = EagerModel(
            Checkpoint.open(checkpoint, _revision(pipe.manifest, checkpoint, revision)),
            pipe.manifest.preprocessing,
            "reference",
            progress,
        )
        model = pipe.manifest.model
        if reference.checkpoint.config != model:
            raise RequestError(f"{checkpoint}: is not of the model in {bundle}: their configurations differ")
        progress(f"{Path(bundle).name}", 0, 1)
        before = _before(pipe, prune)
        images = [page for image in images for page in expanded(image)]
        looks = [_looks(pipe, image, before) for image in images]
        ran = _run(pipe, images, question, prune, tokens)
        progress(f"{Path(bundle).name}", 1, 1)
        del pipe  # gives back its memory before the reference takes some
    D = model.text.width
    L = model.levels
    seen = [reference.seen(of_image) for of_image in looks]
    whole_images = [joined([view["features"] for view in of], of) for of in seen]
    features = np.concatenate(whole_images, axis=1) if images else None
    left = _left(looks, seen, ran.stats.images) if images else np.zeros((1 + L, 1, D), np.float32)
    prompt = ran.prompt
    after = prompt.next_position + np.arange(len(ran.said) - 1, dtype=np.int32)
    whole = np.concatenate([prompt.ids, ran.said[:-1]])
    positions = np.concatenate([prompt.positions, np.broadcast_to(after, (model.axes, len(after)))], axis=1)
    rows = np.concatenate([prompt.feature_rows, np.full(len(after), -1, np.int32)])
    asked = Asked(whole, rows, np.ascontiguousarray(positions), left)
    expected = reference.logits(asked, len(ran.said))
    return _report(bundle, ran, features, expected)


def verify_device(
    bundle: str | Path,
    device: str,
    images: Sequence[str],
    question: str = QUESTION,
    prune: PruneLike = "default",
    tokens: int = TOKENS,
    progress: Progress = silent,
) -> Report:
    """Run one bundle greedily on a device, then on the CPU over the same tokens; needs neither torch nor a checkpoint.

    Raises BackendError, BundleError for graphs that a CPU does not run, ImageError, RequestError.
    """
    _, manifest = open_bundle(bundle)
    dialect = manifest.graphs["language"].dialect
    if dialect == "standard" or manifest.compute == "bf16":
        raise BundleError(
            f"{bundle}: has {manifest.compute} graphs of dialect {dialect}, expected plain or cuda in fp16, which "
            "a CPU runs, too; build it with --dialect plain --precision fp16, or int4 with --vision-precision fp16"
        )
    images = [page for image in images for page in expanded(image)]
    progress(f"on {device}", 0, 1)
    with load(bundle, device, reuse=0) as pipe:
        ran = _run(pipe, images, question, prune, tokens)
        pixels = None if pipe.manifest.model.vision.side else pipe.preprocessing.max_pixels
    progress(f"on {device}", 1, 1)
    progress("on cpu", 0, 1)
    with load(bundle, "cpu", max_pixels=pixels, reuse=0) as pipe:
        other = _run(pipe, images, question, prune, len(ran.said), ran.said)
    progress("on cpu", 1, 1)
    if len(ran.prompt.ids) != len(other.prompt.ids):
        raise BackendError(
            f"{bundle}: found {len(ran.prompt.ids)} tokens after pruning on {device}, expected {len(other.prompt.ids)} "
            "as on the CPU: pixels are pruned otherwise"
        )
    return _report(bundle, ran, other.features, other.logits)


@dataclass(frozen=True, eq=False)
class Ran:
    """A bundle's answer to a question about images."""

    manifest: Manifest
    prompt: Prompt
    features: np.ndarray | None  # [1 + L, K, D] of what the vision tower saw; None without images
    said: np.ndarray  # int32 [n]
    logits: np.ndarray  # [n, V], of each of them
    stats: Stats
    tokens_per_second: float


@dataclass(frozen=True)
class Said(Sampling):
    """Takes what another one said, whatever the logits."""

    tokens: Iterator[int] = field(default_factory=lambda: iter(()))

    def choose(self, logits: np.ndarray, rng: np.random.Generator) -> int:
        """The next of ``tokens``."""
        return int(next(self.tokens))


def _before(pipe: Pipeline, prune: PruneLike) -> list[Pruner]:
    """Those that decide what the vision tower sees; pruners after it take some of that."""
    return [pruner for pruner in pipe.pruners_of(prune) if pruner.after == "image"]


def _run(
    pipe: Pipeline,
    images: Sequence[str],
    question: str,
    prune: PruneLike,
    tokens: int,
    said: np.ndarray | None = None,
) -> Ran:
    """Greedily, or over what was ``said``; stop tokens do not stop."""
    encoded = [pipe.encode(image, _before(pipe, prune)).features for image in images]
    shown = [pipe.pixels(image)[1].placeholders for image in images]
    ids = prompt_ids(pipe.text, pipe.manifest.model, question, shown)
    sampling = Sampling() if said is None else Said(tokens=iter(said))
    sequence = pipe.prepare_tokens(ids, images, prune, max_new_tokens=tokens, sampling=sampling, stop=())
    steps = []
    begin = 0.0
    for step in Steps(pipe.engine, sequence):
        begin = begin or time.perf_counter()
        steps.append(step)
    seconds = max(time.perf_counter() - begin, 1e-9)
    return Ran(
        pipe.manifest,
        sequence.prompt,
        np.concatenate(encoded, axis=1) if encoded else None,
        np.array([step.token for step in steps], np.int32),
        np.stack([step.logits for step in steps]),
        sequence.stats,
        round((len(steps) - 1) / seconds, 1),
    )


def _report(bundle: str | Path, ran: Ran, features: np.ndarray | None, expected: np.ndarray) -> Report:
    """Of what a bundle computed, beside what it should have: features [1 + L, K, D] and logits [n, V]."""
    mine = ran.features
    return Report(
        bundle=str(bundle),
        precision=str(ran.manifest.precision),
        megabytes=round(sum(file.bytes for file in ran.manifest.files.values()) / 1e6, 1),
        embeds=None if mine is None or features is None else compare(mine[0], features[0]),
        deepstack=None if mine is None or features is None else compare(mine[1:], features[1:]),
        logits=compare(ran.logits, expected),
        kl=divergence(ran.logits, expected) if np.isfinite(ran.logits).all() else float("nan"),
        agreement=float((expected.argmax(1) == ran.said).mean()),
        tokens=len(ran.said),
        first_token_ms=round(ran.stats.ttft, 1),
        tokens_per_second=ran.tokens_per_second,
    )


def _looks(pipe: Pipeline, image: str, before: Sequence[Pruner]) -> tuple[Look, ...]:
    """What the vision tower sees of an image after these pruners: every view of which anything is kept."""
    from .exporters.run_model import Look

    frames, shown = pipe.pixels(image)
    found = []
    assert pipe.selector is not None
    made = pipe.selector.looks(frames, shown, before, WORTH)
    for view, (pixels, _, selection) in zip(shown.views, made, strict=True):
        if len(view.rows_wanted(selection.keep)):
            found.append(Look(pipe.backend.download(pixels).copy(), view, selection.keep))
    return tuple(found)


def _left(
    looks: Sequence[Sequence[Look]],
    seen: Sequence[Sequence[dict[str, np.ndarray]]],
    selections: Sequence[Selection],
) -> np.ndarray:
    """The features that the decoder gets, [1 + L, K, D], out of those of everything that the tower saw."""
    from .exporters.run_model import newline_of

    kept = iter(selection for selection in selections if selection.kept)
    parts = []
    for of_image, made in zip(looks, seen, strict=True):
        for look, values in zip(of_image, made, strict=True):
            selection = next(kept)
            wanted = look.keep[look.view.rows_wanted(look.keep)]
            if any(isinstance(pruner, PruneSID) and pruner.class_tokens for pruner in selection.others):
                parts.append(values["class_feature"])
            parts.append(values["features"][:, np.searchsorted(wanted, selection.keep)])
        parts += newline_of(made)
    return np.concatenate(parts, axis=1)


def _revision(manifest: Manifest, checkpoint: str | Path, revision: str | None) -> str | None:
    """Where nobody says: the commit that the bundle was built from, if that is the checkpoint."""
    own = manifest.source.revision if manifest.source.name == str(checkpoint) else ""
    return revision or own or None


def other_files(bundle: str | Path, checkpoint: str | Path, revision: str | None = None) -> list[str]:
    """Which files of the checkpoint are not those that a bundle was made from."""
    from .exporters.hub import find

    _, manifest = open_bundle(bundle)
    directory = find(checkpoint, _revision(manifest, checkpoint, revision)).path
    files = {name: directory / name for name in manifest.source.sha256}
    return [
        name
        for name, expected in manifest.source.sha256.items()
        if not files[name].is_file() or sha256(files[name]) != expected
    ]


def finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


COLUMNS = (
    ("precision", lambda r: r.precision),
    ("MB", lambda r: f"{r.megabytes:.1f}"),
    ("embeds", lambda r: f"{r.embeds.cosine:.5f}" if r.embeds else "-"),
    ("deepstack", lambda r: f"{r.deepstack.cosine:.5f}" if r.deepstack else "-"),
    ("logits", lambda r: f"{r.logits.cosine:.5f}"),
    ("max error", lambda r: f"{max(d.error for d in (r.embeds, r.deepstack, r.logits) if d):.4f}"),
    ("KL", lambda r: f"{r.kl:.5f}"),
    ("agree", lambda r: f"{r.agreement:.1%} of {r.tokens}"),
    ("first ms", lambda r: f"{r.first_token_ms:.0f}"),
    ("tokens/s", lambda r: f"{r.tokens_per_second:.1f}"),
)


def table(reports: Sequence[Report]) -> list[str]:
    """Side by side, one bundle a line; cosines are the least of any token."""
    rows = [["bundle", *(name for name, _ in COLUMNS)]]
    rows += [[Path(r.bundle).name, *(cell(r) for _, cell in COLUMNS)] for r in reports]
    return aligned(rows)


def main(
    bundles: Sequence[str],
    checkpoint: str | None,
    images: Sequence[str],
    question: str,
    prunes: Sequence[PruneLike],
    device: str,
    tokens: int,
    as_json: bool,
    cosine: float,
    kl: float,
    agreement: float,
    revision: str | None,
) -> int:
    """Print a table or JSON; 0 if every bundle is within the limits, else 1. ``prunes``: of each bundle.

    ``checkpoint``: None to hold them against the CPU.
    """
    for bundle in bundles:
        open_bundle(bundle)  # before minutes of work
    reports = []
    with Bar(as_json) as bar:
        for bundle, prune in zip(bundles, prunes, strict=True):
            if checkpoint is None:
                made = verify_device(bundle, device, images, question, prune, tokens, bar.update)
            else:
                made = verify(
                    bundle, checkpoint, images, question, prune, device, tokens, bar.update, revision
                )
            reports.append(made)
    for bundle in bundles:
        if checkpoint is not None and (changed := other_files(bundle, checkpoint, revision)):
            click.echo(
                f"{bundle}: was not built from these files of {checkpoint}: {', '.join(changed)}", err=True
            )
    problems = {report.bundle: report.problems(cosine, kl, agreement) for report in reports}
    if as_json:
        rows = [{**asdict(r), "problems": problems[r.bundle]} for r in reports]
        click.echo(json.dumps(finite(rows), allow_nan=False))
    else:
        click.echo("\n".join(table(reports)))
        for bundle, found in problems.items():
            for problem in found:
                click.echo(f"{bundle}: {problem}", err=True)
    return int(any(problems.values()))
