"""Checkpoint -> bundle directory: graphs with streamed weights, tokenizer, chat template, numbers, hashes."""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..models import manifest
from ..models.checks import shown
from ..models.config import ModelConfig, Preprocessing
from ..models.errors import CheckpointError
from ..models.manifest import sha256
from ..models.precision import BYTES, Precision, Wanted, resolve
from ..models.progress import Progress
from ..models.pruners import Pruner, settings_of
from ..models.pruners.pixelprune import PixelPrune, prune_file
from ..models.version import __version__
from . import graphs
from .checkpoint import Checkpoint
from .fp16_range import ALWAYS, float32_kinds
from .lowering.dialects import DIALECTS, OPENVINO, Dialect
from .preprocessing import preprocessing_of
from .pruners import Sizes, pruning_graphs
from .run_model import Sample
from .text_files import copy_text, special_tokens, stop_tokens, text_notices
from .weights.attach import attach, cast_after_load, not_in_groups, weight_bytes
from .weights.gptq import Moments, collect

OTHER_TOWERS = {"ort": (OPENVINO,)}  # dialect -> those that the tower is written in as well
HEAD_DIM_STEP = 8  # of GroupQueryAttention; it loads graphs with other widths, and fails when they run
FIXED_RAM = 680_000_000  # bytes: torch, the exporter and one traced graph
# bytes to run the layers in float32: for each value of the largest tensor, and for each unit inside of vision's MLPs
CALIBRATION_RAM = (3, 120_000)
GRAPHS_DISK = 2_000_000  # bytes of all graphs without their weights


@dataclass(frozen=True)
class Plan:
    """What a build will do and what it needs."""

    checkpoint: Checkpoint
    precision: Precision
    dialect: str
    preprocessing: Preprocessing
    prune: tuple[Pruner, ...]  # of requests that do not say how
    weights: int  # bytes of the stored weights
    disk: int  # bytes the bundle takes
    ram: int  # bytes of memory at the peak
    notices: tuple[str, ...]  # what the user should know

    @property
    def compute(self) -> str:
        """What the graphs calculate in."""
        return graphs.compute_precision(self.precision.base, DIALECTS[self.dialect])


def plan(
    path: str | Path,
    wanted: Wanted = Wanted(),  # noqa: B008 (frozen)
    dialect: str = "ort",
    engines: bool = False,
    calibrated: int = 0,
    prune: Callable[[Sequence[Pruner]], Sequence[Pruner]] = lambda own: own,
    revision: str | None = None,
) -> Plan:
    """Open and check a checkpoint and estimate what its bundle needs (``engines``: they will be compiled from it).

    ``calibrated``: images that matrices in int4 are fitted to; ``prune``: given the family's pruners, those of requests
    that do not say how to prune.
    ``revision``: of a checkpoint on the hub. Raises CheckpointError.
    """
    checkpoint = Checkpoint.open(path, revision)
    if dialect not in DIALECTS:
        raise CheckpointError(f"dialect is {dialect!r}, expected one of: {', '.join(DIALECTS)}")
    precision = resolve(wanted, checkpoint.precision, dialect, checkpoint.config.text.tied_head, engines)
    _check_head(checkpoint.config.text.head_dim, dialect)
    if calibrated and not checkpoint.config.sees:
        raise CheckpointError(
            f"found images to calibrate a {checkpoint.config.family} model with, expected none: it takes text only"
        )
    if calibrated:
        precision = _with_calibration(precision, dialect, calibrated)
    notices = list(checkpoint.notices)
    if wide := not_in_groups(checkpoint, precision):
        notices.append(
            f"{len(wide)} matrices stay in {precision.base}: groups of {precision.group_size} do not divide their "
            "inputs"
        )
    pre = preprocessing_of(checkpoint, notices)
    notices += text_notices(checkpoint)
    weights = weight_bytes(checkpoint, precision)
    tokenizer = checkpoint.path / "tokenizer.json"
    disk = int(weights * 1.01) + GRAPHS_DISK + (tokenizer.stat().st_size if tokenizer.is_file() else 0)
    if calibrated:  # moments: while building
        tables = checkpoint.family.weights(checkpoint.config)
        matrices = [
            w.shape for graph in _fitted(precision) for w in tables[graph].values() if len(w.shape) == 2
        ]
        disk += sum(4 * inner**2 for _, inner in matrices)
    # the largest tensor: as mapped, as read, as converted, as integers
    tables = checkpoint.family.weights(checkpoint.config)
    largest = max(math.prod(weight.shape) for table in tables.values() for weight in table.values())
    ram = FIXED_RAM + largest * 2 * BYTES[checkpoint.precision] + largest * BYTES[precision.base]
    if calibrated:
        per_value, per_unit = CALIBRATION_RAM
        ram += per_value * largest + per_unit * checkpoint.config.vision.ffn
    pruners = tuple(prune(checkpoint.family.prune))
    if pruners and not checkpoint.config.sees:
        raise CheckpointError(
            f"found a pruner for a {checkpoint.config.family} model, expected none: it takes text only"
        )
    return Plan(checkpoint, precision, dialect, pre, pruners, weights, disk, ram, tuple(notices))


def _check_head(head_dim: int, dialect: str) -> None:
    """Raise CheckpointError for a head width that an operator does not take."""
    if dialect in ("ort", "cuda") and head_dim % HEAD_DIM_STEP:
        raise CheckpointError(
            f"head_dim is {head_dim}, expected a multiple of {HEAD_DIM_STEP} for ONNX Runtime's GroupQueryAttention; "
            "build it with --dialect plain, which runs on a CPU, too"
        )


def _with_calibration(precision: Precision, dialect: str, calibrated: int) -> Precision:
    """Fitted to so many images; raises CheckpointError where they would be for nothing."""
    if _fitted(precision):
        return replace(precision, calibrated=calibrated)
    if graphs.compute_precision(precision.base, DIALECTS[dialect]) != "fp16":
        raise CheckpointError(
            f"found images to calibrate with and weights in {precision}, expected int4 for the decoder's layers or "
            "the vision tower, or graphs in fp16, which are checked on them; add --precision int4, or leave "
            "--calibrate out"
        )
    return precision


def _fitted(precision: Precision) -> list[str]:
    """The graphs with layers in int4."""
    return [graph for graph in ("vision", "language") if precision.of(graph) == "int4"]


def export(
    plan: Plan,
    directory: Path,
    progress: Progress,
    screens: np.ndarray,
    samples: Callable[[Path], Sequence[Sample]] = lambda directory: (),
) -> None:
    """Write the bundle's files into an existing empty directory; bundle.json comes last.

    ``screens`` uint8 [H, W, 3], sides multiples of the block: what every fp16 model is tried on. ``samples``: what to
    calibrate with, given the directory with tokenizer.json and chat_template.jinja.
    """
    checkpoint = plan.checkpoint
    dialect = DIALECTS[plan.dialect]
    config = checkpoint.config
    progress("trace", 0, 3)
    interface = copy_text(checkpoint, directory)
    tried = samples(directory)
    kinds = float32_kinds(checkpoint, plan.preprocessing, plan.compute, screens, progress, tried)
    models, others = _trace(plan, kinds, progress)
    if config.sees:
        sizes = Sizes.of(config, graphs.PRECISIONS[plan.compute])
        for name, graph in pruning_graphs(sizes, dialect).items():
            ir.save(graph, directory / name)
    with tempfile.TemporaryDirectory(dir=directory) as moments_directory:
        moments: Moments | None = None
        if plan.precision.calibrated:
            where = Path(moments_directory)
            pre = plan.preprocessing
            moments = collect(checkpoint, pre, tried, _fitted(plan.precision), where, progress)
        for name in config.with_weights:
            attach(models[name], checkpoint, name, plan.preprocessing, dialect, plan.precision, moments)
            _save(models[name], directory, name, progress)
        for other, tower in others:
            attach(tower, checkpoint, "vision", plan.preprocessing, other, plan.precision.for_openvino())
            _save_beside(tower, directory, "vision", other)
    files = _hash(directory, "hash bundle", progress)
    sources = {file.name: file for file in checkpoint.files()}
    progress("hash checkpoint", 0, len(sources))
    hashes = {}
    for i, (name, file) in enumerate(sources.items()):
        hashes[name] = sha256(file)
        progress("hash checkpoint", i + 1, len(sources))
    manifest.write(_manifest(plan, dialect, config, interface, kinds, files, hashes), directory)


def _trace(
    plan: Plan, kinds: dict[str, tuple[str, ...]], progress: Progress
) -> tuple[dict[str, ir.Model], list[tuple[Dialect, ir.Model]]]:
    """The graphs with weights by their names, and the tower in the other dialects."""
    config = plan.checkpoint.config
    dialect = DIALECTS[plan.dialect]
    base = plan.precision.base
    models: dict[str, ir.Model] = {}
    others: list[tuple[Dialect, ir.Model]] = []
    if config.sees:
        progress("trace", 1, 3)
        beside = OTHER_TOWERS.get(plan.dialect, ())
        computed = plan.precision.for_openvino().base if beside else base
        in_float32 = (*ALWAYS, "residual") if beside else kinds["vision"]
        models["vision"], *towers = graphs.vision_graphs(config, (dialect, *beside), computed, in_float32)
        others = list(zip(beside, towers, strict=True))
    progress("trace", 2, 3)
    models["language"] = graphs.language_graph(config, dialect, base, kinds["language"])
    progress("trace", 3, 3)
    return models, others


def _manifest(
    plan: Plan,
    dialect: Dialect,
    config: ModelConfig,
    interface: str,
    kinds: dict[str, tuple[str, ...]],
    files: dict[str, manifest.FileRecord],
    hashes: dict[str, str],
) -> manifest.Manifest:
    pixel = next((pruner for pruner in plan.prune if isinstance(pruner, PixelPrune)), PixelPrune())
    named = {"prune": prune_file(pixel.graph)}  # what engines are compiled of
    others = OTHER_TOWERS.get(dialect.name, ())
    return manifest.Manifest(
        schema=manifest.SCHEMA,
        family=config.family,
        source=manifest.Source(shown(plan.checkpoint.name), plan.checkpoint.revision, hashes),
        precision=plan.precision,
        compute=plan.compute,
        float32_kinds=kinds,
        interface=interface,
        graphs={
            name: manifest.Graph(
                named.get(name, f"{name}.onnx"),
                dialect.name,
                {other.name: _beside(name, other) for other in others} if name == "vision" else {},
            )
            for name in config.graphs
        },
        model=config,
        preprocessing=plan.preprocessing,
        prune=settings_of(plan.prune),
        context=config.text.context,
        stop_tokens=stop_tokens(plan.checkpoint),
        special_tokens=special_tokens(plan.checkpoint) if interface == "text" else {},
        versions={
            "ppexport": __version__,
            **{
                p: importlib.metadata.version(p)
                for p in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")
            },
        },
        files=files,
    )


def _save(model: ir.Model, directory: Path, name: str, progress: Progress) -> None:
    """Write name.onnx and name.onnx.data, one weight at a time."""
    stage = f"{name} weights"

    def step(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress(stage, info.index, info.total)

    path = directory / f"{name}.onnx"
    try:
        ir.save(
            model,
            path,
            external_data=f"{path.name}.data",
            alignment=4096,
            align_threshold=4096,
            callback=step,
        )
    except ir.serde.SerdeError as err:  # small weights are read while the graph is written
        cause: BaseException | None = err
        while cause is not None and not isinstance(cause, CheckpointError):
            cause = cause.__cause__
        raise (cause or err) from None
    progress(stage, 1, 1)


def _beside(name: str, dialect: Dialect) -> str:
    """The file of a graph that stands in the bundle in another dialect as well."""
    return f"{name}.{dialect.name}.onnx"


def _save_beside(model: ir.Model, directory: Path, name: str, dialect: Dialect) -> None:
    """Write a graph whose weights are those that ``name`` was saved with: its file refers to theirs."""
    saved = ir.load(directory / f"{name}.onnx").graph.initializers
    for own in model.graph.initializers.values():
        if not isinstance(own.const_value, ir.LazyTensor):
            continue  # a constant
        assert own.name is not None
        stored = saved[own.name].const_value
        assert stored is not None
        assert stored.shape == own.const_value.shape, own.name
        if stored.dtype != own.dtype:
            assert own.dtype is not None
            cast_after_load(model, own, stored.dtype, own.dtype)
        own.const_value = stored
    ir.save(model, directory / _beside(name, dialect))


def _hash(directory: Path, stage: str, progress: Progress) -> dict[str, manifest.FileRecord]:
    paths = sorted(p for p in directory.iterdir() if p.is_file())
    records = {}
    for i, path in enumerate(paths):
        progress(stage, i, len(paths))
        records[path.name] = manifest.FileRecord(path.stat().st_size, sha256(path))
    progress(stage, len(paths), len(paths))
    return records
