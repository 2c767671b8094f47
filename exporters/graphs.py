"""torch module -> onnx_ir model without any weight in memory, in one dialect."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence, Set
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from ..models.config import ModelConfig
from ..models.dtype import BY_PRECISION
from .decoders import DECODERS
from .lowering.dialects import Dialect, lower
from .lowering.passes import in_float32
from .towers import TOWERS

PRECISIONS = {name: ir.DataType(dtype.onnx) for name, dtype in BY_PRECISION.items()}
TORCH: dict[str, torch.dtype] = {name: getattr(torch, dtype.name) for name, dtype in BY_PRECISION.items()}


def compute_precision(precision: str, dialect: Dialect) -> str:
    """What a graph computes in. The dialect ``ort`` stores weights in 16 bits but computes in float32 (ONNX Runtime has
    nothing faster on a CPU); the others are strongly typed and compute in what they store."""
    return "fp32" if dialect.name == "ort" else precision


def vision_graphs(
    model: ModelConfig,
    dialects: Sequence[Dialect],
    precision: str = "fp32",
    float32_kinds: Sequence[str] = (),
) -> list[ir.Model]:
    """The vision tower in each of the dialects, traced once: inputs image, keep and what else it takes; outputs
    features and what else it gives.

    ``float32_kinds``: values to calculate in float32 whatever the precision (exporters/fp16_range.py). Raises
    ValueError for dialects that begin in different ways, which are different traces.
    """
    starts = {dialect.cast_first for dialect in dialects}
    if len(starts) != 1:
        names = ", ".join(dialect.name for dialect in dialects)
        raise ValueError(f"found {names}, expected dialects that cast the image first, or ones that do not")
    traced = trace_vision(model, starts.pop(), TORCH[precision], frozenset(float32_kinds))
    towers = []
    for dialect in dialects:
        tower = traced.clone()
        if compute_precision(precision, dialect) == "fp32":
            in_float32(tower)
        towers.append(_lowered(tower, dialect))
    return towers


def language_graph(
    model: ModelConfig, dialect: Dialect, precision: str = "fp32", float32_kinds: Sequence[str] = ()
) -> ir.Model:
    """The decoder: inputs and outputs as in its forward; a state ``x`` comes back as ``new_x``.

    ``float32_kinds`` as for vision_graphs.
    """
    computed = BY_PRECISION[compute_precision(precision, dialect)].name
    return _lowered(trace_language(model, computed, frozenset(float32_kinds)), dialect)


def trace_vision(
    model: ModelConfig, cast_first: bool, dtype: torch.dtype, float32_kinds: Set[str]
) -> ir.Model:
    """The tower in operators of ONNX and nodes of ops.py, which no dialect has translated yet."""
    block = model.vision.block
    with FakeTensorMode():
        tower = TOWERS[model.tower].Tower(model, cast_first, dtype, float32_kinds)
        others = TOWERS[model.tower].other_inputs(model.vision)
        sizes = {"K": 5, "G": 3, "U": 4}
        args = (
            torch.empty(3 * block, 4 * block, 3, dtype=torch.uint8),
            torch.empty(sizes["K"], dtype=torch.int32),
            *(
                torch.empty(*(sizes[n] if isinstance(n, str) else n for n in shape), dtype=torch.int32)
                for shape in others.values()
            ),
        )
    axes = {name: Dim(name, max=1 << 24) for name in sizes}
    shapes = (
        {0: block * Dim("rows", max=4096), 1: block * Dim("cols", max=4096)},
        {0: axes["K"]},
        *({i: axes[n] for i, n in enumerate(shape) if isinstance(n, str)} for shape in others.values()),
    )
    outputs = ["features", *(output.name for output in model.other_outputs)]
    graph = _trace(tower, args, shapes, ["image", "keep", *others], outputs)
    graph.graph.inputs[0].shape = ir.Shape(["H", "W", 3])
    return graph


def trace_language(model: ModelConfig, computed: str, float32_kinds: Set[str]) -> ir.Model:
    """The decoder, as ``trace_vision``; ``computed``: name of the dtype that it calculates in."""
    c = model.text
    dtype = getattr(torch, computed)
    B, S, P, K, M = (Dim(name, min=1, max=1 << 20) for name in "BSPKM")
    axes = {"slots": B, "M": M}
    with FakeTensorMode():
        decoder = DECODERS[model.decoder].Decoder(model, dtype, float32_kinds)
        states = [
            torch.empty(*state.sized(slots=2, capacity=11), dtype=getattr(torch, state.stored(computed)))
            for state in model.states
        ]
        args = (
            torch.empty(2, 7, dtype=torch.int32),
            torch.empty(1 + model.levels, 5, c.width, dtype=dtype),
            torch.empty(2, 7, dtype=torch.int32),
            torch.empty(model.axes, 2, 7, dtype=torch.int32),
            torch.empty(2, dtype=torch.int32),
            torch.empty(2, 3, dtype=torch.int32),
            states,
        )
    state_shapes = [
        {i: axes[n] for i, n in enumerate(state.shape) if isinstance(n, str)} for state in model.states
    ]
    shapes = ({0: B, 1: S}, {1: K}, {0: B, 1: S}, {1: B, 2: S}, {0: B}, {0: B, 1: P}, state_shapes)
    names = [state.name for state in model.states]
    inputs = ["input_ids", "features", "feature_rows", "position_ids", "start", "logits_at", *names]
    return _trace(decoder, args, shapes, inputs, ["logits", *(f"new_{name}" for name in names)])


def _trace(
    module: torch.nn.Module, args: tuple[Any, ...], shapes: Any, inputs: list[str], outputs: list[str]
) -> ir.Model:
    """torch.onnx.export on fake tensors: shapes without memory."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns that torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
            program = torch.onnx.export(
                module.eval(),
                args,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                optimize=False,
                opset_version=18,
                verbose=False,
            )
    finally:
        registration.setLevel(level)
    assert program is not None
    return program.model


def _lowered(model: ir.Model, dialect: Dialect) -> ir.Model:
    """With the dialect's nodes, cleaned up."""
    lower(model, dialect)
    clean(model)
    model.graph.name = "ppexport"
    model.producer_name = "ppexport"
    model.producer_version = ""
    return model


def clean(model: ir.Model) -> None:
    """Merge equal nodes (each layer computes its mask and positions anew), drop what nobody reads and trace notes."""
    for step in (CommonSubexpressionEliminationPass(), IdentityEliminationPass(), RemoveUnusedNodesPass()):
        step(model)
    RemoveUnusedOpsetsPass()(model)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
