"""PruneSID's graph: given the loadings it selects what the authors' code does, and it compiles for engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import prunesid_spec as spec
import pytest
from conftest import GOLDEN

from ppexport.exporters.lowering.algebra import Term
from ppexport.exporters.lowering.dialects import DIALECTS
from ppexport.exporters.lowering.onnx_writer import Ops
from ppexport.exporters.pruners import Sizes
from ppexport.exporters.pruners.pixelprune import finish, output
from ppexport.exporters.pruners.prunesid import graphs, selection
from ppexport.runtime.backends import trt_api

CASES = sorted((GOLDEN / "prunesid").glob("*.npz"))


def selection_session(variant: str) -> ort.InferenceSession:
    """The part of the graph after the loadings."""
    op = Ops()
    features = ir.val("features", ir.DataType.FLOAT, ["K", "D"])
    loadings = ir.val("loadings", ir.DataType.FLOAT, ["K", "p"])
    numbers = [ir.val(name, ir.DataType.FLOAT, [1]) for name in ("budget", "grouped", "information")]
    inputs = [features, loadings, *numbers]
    score = None
    if variant == "llava":
        inputs.append(ir.val("score", ir.DataType.FLOAT, ["K"]))
        score = Term(op, op("Unsqueeze", inputs[-1], op.ints([1])))
    found = selection(variant, Term(op, features), Term(op, loadings), score, *(Term(op, n) for n in numbers))
    outputs = [output(x, n, "K" if n != "count" else 1) for x, n in zip(found, ("order", "count", "group"))]  # noqa: B905
    graph = finish(op, DIALECTS["ort"], inputs, outputs)
    return ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_selection_equals_the_authors_in_index_and_order(path: Path) -> None:
    case = np.load(path)
    variant = path.stem.partition("_")[0]
    budget = int(case["need"]) - (variant == "llava")  # which counts the class token
    given = {
        "features": case["features"].astype(np.float32),
        "loadings": case["loadings"],
        "budget": np.array([budget], np.float32),
        "grouped": np.ones(1, np.float32),
        "information": np.zeros(1, np.float32),
    }
    if variant == "llava":
        given["score"] = case["score"]
    order, count, group = selection_session(variant).run(None, given)
    assert order[: count[0]].tolist() == case["order"].tolist()
    assert group.tolist() == case["loadings"].argmax(1).tolist()
    score = case["score"] if variant == "llava" else None
    assert spec.select(variant, case["features"], case["loadings"], budget, score) == case["order"].tolist()


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("prunesid.qwen", "plain"),
        ("prunesid.llava", "standard"),
        pytest.param("prunesid.qwen", "standard", marks=pytest.mark.slow),
        pytest.param("prunesid.llava", "plain", marks=pytest.mark.slow),
        ("prunesid.information", "plain"),
    ],
)
def test_the_graph_compiles_for_tensorrt_rtx(name: str, dialect: str) -> None:
    """With its number of tokens and of groups open, and without TF32."""
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx is not installed")
    with_class_token = name != "prunesid.qwen"
    sizes = Sizes(32, 0 if with_class_token else 3, 256, ir.DataType.BFLOAT16, 128 if with_class_token else 0)
    graph = graphs(sizes, DIALECTS[dialect])[name]
    builder = trt.Builder(trt_api.logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt_api.logger(trt))
    parsed = parser.parse(ir.to_proto(graph).SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    levels = 1 + sizes.levels
    ranges = {
        "features": ((levels, 1, 256), (levels, 576, 256), (levels, 2048, 256)),
        "hidden": ((1, 128), (576, 128), (2048, 128)),
        "score": ((1,), (576,), (2048,)),
        "directions": ((9,), (24,), (72,)),
    }
    for value in graph.graph.inputs:
        if value.name in ranges:
            profile.set_shape(value.name, *ranges[value.name])
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config).nbytes > 0
