"""``ppexport build``: check, estimate, export and compile into a temporary directory, rename when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .calibration import Calibration, synthetic_screens
from .compile_bundle import check_dialect, check_pruners, compile_bundle, plan_sizes
from .memory import available_memory
from .models.errors import BackendError, BundleError, CheckpointError, RequestError, SpaceError
from .models.manifest import FILE, Manifest
from .models.precision import Wanted
from .models.profiles import Profiles
from .models.progress import Progress, silent
from .models.pruners import Pruner, listed
from .partial import is_free, partial_directory
from .runtime.bundle import open_bundle
from .trt_build import Options, prepare

if TYPE_CHECKING:
    from .exporters.bundle import Plan
    from .runtime.sequence import PruneLike


def build(
    checkpoint: str | Path,
    output: str | Path,
    precision: str | Wanted = "auto",
    dialect: str = "auto",
    targets: str | Sequence[str] = (),
    sizes: Profiles | None = None,
    options: Options = Options(),  # noqa: B008 (frozen)
    calibration: Calibration | None = None,
    on_plan: Callable[[Plan, Profiles | None], None] = lambda plan, sizes: None,
    progress: Progress = silent,
    prune: PruneLike | Callable[[Sequence[Pruner]], Sequence[Pruner]] = "default",
    revision: str | None = None,
) -> Path:
    """Make a bundle directory from a Hugging Face checkpoint; returns its path.

    ``checkpoint``: its directory, or its name on the hub ("Qwen/Qwen2.5-VL-3B-Instruct"), there at ``revision``.
    ``precision``: of the stored weights, "auto" (the checkpoint's; bf16 for a float32 checkpoint and a target), "fp32",
    "fp16", "bf16", "int8", "int4" or "w8a8"; a Wanted says it part by part (models/precision.py). ``targets``: what to
    compile the graphs for, "tensorrt" or "tensorrt-rtx" (engines.py; ``sizes`` and ``options`` are theirs). ``dialect``
    "auto" is "standard" with a target and "ort" without. ``calibration``: images that int4 is fitted to, pruned as the
    bundle prunes. ``prune``: how requests are pruned that do not say (models/pruners), None: not at all; "default" is
    the family's way, and a function is given that and says what to make of it. ``on_plan`` is told what will be done
    before that is written. An existing empty directory may be the output.
    Raises CheckpointError, SpaceError (disk or memory would not suffice), BundleError (the output exists), BackendError
    (packages are not installed, or a compiler refuses), RequestError (sizes that do not fit). On any error or
    interruption nothing is left behind.
    """
    if not isinstance(output, (str, os.PathLike)):
        raise BundleError(f"the output is {output!r:.80}, expected the path of a directory to make")
    targets = [targets] if isinstance(targets, str) else targets
    output = Path(os.path.abspath(output))
    try:
        taken = not is_free(output)
    except (OSError, ValueError) as err:
        raise BundleError(f"{output}: cannot be used as an output directory: {err}") from err
    if taken:
        raise BundleError(f"{output}: already exists; remove it or choose another name")
    for target in targets:
        prepare(target, options)  # before minutes of exporting
    exporter = _exporter()
    if dialect == "auto":
        dialect = "standard" if targets else "ort"
    wanted = precision if isinstance(precision, Wanted) else Wanted(precision)
    images = calibration.files() if calibration else []

    def pruners(own: Sequence[Pruner]) -> Sequence[Pruner]:
        found = prune(own) if callable(prune) else own if prune == "default" else prune
        return listed(list(found) if isinstance(found, tuple) else found, " or 'default'")

    plan = exporter.plan(checkpoint, wanted, dialect, bool(targets), len(images), pruners, revision)
    if targets:
        check_pruners(plan.prune)
        check_dialect({plan.dialect}, plan.compute, "what was asked for")
        config = plan.checkpoint.config
        preprocessing = plan.preprocessing
        sizes = plan_sizes(config, config.text.context, preprocessing, plan.dialect, sizes, options)
    on_plan(plan, sizes)
    _check_space(plan, output, len(targets))
    created = _make_parents(output.parent)
    try:
        with partial_directory(output, FILE) as work:
            screens = synthetic_screens(plan.checkpoint.config.vision.block)
            exporter.export(
                plan, work, progress, screens, lambda d: calibration.samples(plan, d) if calibration else ()
            )
            _check_text(work)
            for target in targets:
                compile_bundle(work, target, sizes, options, progress)
    except BaseException as err:
        with contextlib.suppress(OSError):  # somebody else may have put something there meanwhile
            for parent in created:
                parent.rmdir()
        if isinstance(err, OSError) and not isinstance(err, (BundleError, SpaceError)):
            raise SpaceError(f"{output}: cannot be written: {err}; nothing was left behind") from err
        raise
    return output


def compile_in_place(
    bundle: str | Path,
    targets: Sequence[str],
    sizes: Profiles | None = None,
    options: Options = Options(),  # noqa: B008 (frozen)
    on_plan: Callable[[Manifest, int, Profiles], None] = lambda manifest, weights, sizes: None,
    progress: Progress = silent,
) -> None:
    """Compile the engines of an existing bundle; needs no export packages. ``on_plan`` is told the sizes first.

    Raises as engines.compile_bundle.
    """
    directory, manifest = open_bundle(bundle)
    for target in targets:
        prepare(target, options)  # before the first one replaces anything
    dialect = check_dialect({g.dialect for g in manifest.graphs.values()}, manifest.compute, str(directory))
    sizes = plan_sizes(manifest.model, manifest.context, manifest.preprocessing, dialect, sizes, options)
    weights = sum(record.bytes for name, record in manifest.files.items() if name.endswith(".onnx.data"))
    on_plan(manifest, weights, sizes)
    _check_disk(directory, len(targets) * weights, "engines")
    for target in targets:
        compile_bundle(bundle, target, sizes, options, progress)


def _check_text(work: Path) -> None:
    """Raise CheckpointError unless the finished bundle opens and its tokenizer and chat template fit its model."""
    _, manifest = open_bundle(work)
    if manifest.interface == "tokens":
        return
    from .runtime.text import Text

    vocab = manifest.model.text.vocab
    try:
        text = Text(work, manifest.model.image_token, manifest.special_tokens)
        ids = text.encode("What is the total?", [1] if manifest.model.sees else [])
    except (BundleError, RequestError) as err:
        raise CheckpointError(f"the checkpoint's tokenizer and chat template do not work: {err}") from err
    largest = max(max(text.tokenizer.get_vocab().values()), int(ids.max()))
    if largest >= vocab:
        raise CheckpointError(
            f"tokenizer.json has token {largest}, expected ids under the model's vocabulary of {vocab}"
        )


def _exporter():  # type: ignore[no-untyped-def]  # a module, imported here because it imports torch
    try:
        from .exporters import bundle
    except ImportError as err:
        raise BackendError(
            f"{err.name} is not installed, expected for 'ppexport build'; install it with: "
            "pip install 'ppexport[export]'"
        ) from err
    return bundle


def _check_space(plan: Plan, output: Path, targets: int) -> None:
    """Raise SpaceError if the disk or the memory that is free is less than the plan's estimate.

    Engines hold the weights once more.
    """
    existing = next(p for p in [output.absolute().parent, *output.absolute().parents] if p.exists())
    _check_disk(existing, plan.disk + targets * plan.weights, "bundle")
    memory = available_memory()
    if memory is not None and memory < plan.ram:
        raise SpaceError(
            f"{_mb(memory)} of memory are available, expected at least {_mb(plan.ram)} to build; close other programs"
        )


def _check_disk(directory: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise SpaceError(
            f"{directory}: {_mb(free)} free, expected at least {_mb(needed)} for the {what}; make room"
        )


def _make_parents(directory: Path) -> list[Path]:
    """Create missing directories; returns those created, innermost first."""
    missing = [p for p in [directory, *directory.parents] if not p.exists()]
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as err:
        raise SpaceError(f"{directory}: cannot be created: {err}") from err
    return missing


def _mb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
