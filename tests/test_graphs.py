"""Graph passes: the graph before and after; precision and memory properties of the exported graphs."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import GOLDEN, IMAGES, usual_and_slow
from invariants import relative_error
from traced import Traces

import ppexport
from ppexport.build_bundle import build
from ppexport.exporters import graphs
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.exporters.fp16_range import ALWAYS
from ppexport.exporters.lowering.dialects import DIALECTS, OPENVINO, lower
from ppexport.exporters.lowering.onnx_writer import Ops
from ppexport.exporters.lowering.passes import in_float32, one_reshape
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.exporters.weights.attach import attach, cast_after_load
from ppexport.models.precision import Wanted, resolve
from ppexport.runtime.image import prepare

# of which only the stored weights differ from others
RARE = [
    ("ort", "fp16"),
    ("ort", "bf16"),
    ("ort", "int8"),
    ("plain", "fp32"),
    ("plain", "bf16"),
    ("plain", "int4"),
]
RARE += [("standard", "fp32"), ("standard", "fp16")]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(GOLDEN / "e2e" / "model")


def model_of(op: Ops, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=op.nodes, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def types(model: ir.Model) -> Counter:
    return Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph)


def test_lower_replaces_a_node_and_keeps_the_value_name() -> None:
    x, w = ir.val("x", ir.DataType.FLOAT, ["B", 4]), ir.val("w", ir.DataType.FLOAT, [4])
    op = Ops()
    y = op("RMSNorm", x, w, domain="ppexport", epsilon=1e-6)
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", 4])
    model = model_of(op, [x, w], [y])
    assert types(model) == {"ppexport::RMSNorm": 1}
    lower(model, DIALECTS["standard"])
    assert types(model) == {"RMSNormalization": 1}
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert model.graph.opset_imports == {"": 24}


def test_clean_merges_equal_nodes_and_drops_unused_ones() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [4])
    op = Ops()
    a, b = op("Exp", x), op("Exp", x)
    op("Neg", x)
    y = op("Add", a, b)
    model = model_of(op, [x], [y])
    assert types(model) == {"Exp": 2, "Neg": 1, "Add": 1}
    graphs.clean(model)
    assert types(model) == {"Exp": 1, "Add": 1}


def test_cast_after_load_changes_storage_not_results() -> None:
    x, w = ir.val("x", ir.DataType.FLOAT, [2, 3]), ir.val("w", ir.DataType.FLOAT, [3, 2])
    op = Ops()
    y = op("MatMul", x, w)
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 2])
    model = model_of(op, [x], [y])
    values = np.array([[1, 2], [3, 4], [0.5, -8]], np.float16)  # exact in float16
    w.const_value = ir.tensor(values, name="w")
    model.graph.initializers.add(w)
    cast_after_load(model, w, ir.DataType.FLOAT16, ir.DataType.FLOAT)
    assert types(model) == {"Cast": 1, "MatMul": 1}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(session.run(None, {"x": given})[0], given @ values.astype(np.float32))


def test_decoder_nodes_of_each_dialect(checkpoint: Checkpoint) -> None:
    layers = checkpoint.config.text.layers
    found = types(graphs.language_graph(checkpoint.config, DIALECTS["ort"]))
    assert found["com.microsoft::GroupQueryAttention"] == layers
    assert found["com.microsoft::RotaryEmbedding"] == 2 * layers
    found = types(graphs.language_graph(checkpoint.config, DIALECTS["standard"]))
    assert found["Softmax"] == layers
    assert found["TensorScatter"] == 2 * layers
    assert found["LessOrEqual"] == 1  # one mask for all layers
    assert not [name for name in found if "::" in name]


def test_standard_vision_casts_the_image_first(checkpoint: Checkpoint) -> None:
    """TensorRT takes uint8 as a graph input only."""
    (model,) = graphs.vision_graphs(checkpoint.config, [DIALECTS["standard"]])
    image = next(v for v in model.graph.inputs if v.name == "image")
    assert {user.op_type for user, _ in image.uses()} == {"Cast", "Shape"}


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl", "qwen2_5_vl", "llava_next"])
def test_a_tower_of_a_trace_in_16_bits_is_the_one_in_float32(family: str, tmp_path: Path) -> None:
    """Node by node; and what has been made of it first leaves the other dialect's as it would be alone."""
    write_random(random_config(family, "tiny"), tmp_path)
    write_text_files(tmp_path, family)
    config = Checkpoint.open(tmp_path).config
    kinds = (*ALWAYS, "residual")
    wide, narrow = graphs.vision_graphs(config, [DIALECTS["ort"], OPENVINO], "bf16", kinds)
    assert structure(wide) == structure(*graphs.vision_graphs(config, [DIALECTS["ort"]]))
    assert structure(narrow) == structure(*graphs.vision_graphs(config, [OPENVINO], "bf16", kinds))
    assert not {value.dtype for node in wide.graph for value in node.outputs} & {ir.DataType.BFLOAT16}


def test_what_a_trace_in_16_bits_cannot_give() -> None:
    """A constant that was rounded; and casts go, of graph outputs and of what casts gave, too."""
    x = ir.val("x", ir.DataType.FLOAT, ["B", 4])
    op = Ops()
    narrow = op("Cast", x, to=ir.DataType.BFLOAT16)
    y = op("Cast", op("Add", narrow, narrow), to=ir.DataType.FLOAT)
    for value, dtype in ((narrow, ir.DataType.BFLOAT16), (y, ir.DataType.FLOAT)):
        value.type = ir.TensorType(dtype)
    y.producer().inputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    y.name = "y"
    model = model_of(op, [x], [y])
    in_float32(model)
    assert types(model) == {"Add": 1}
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("y", ir.DataType.FLOAT)]
    op = Ops()
    half = op("Constant", value=ir.tensor(np.float16(0.1)))
    half.type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(ValueError, match=r"found a constant in 16 bits .*, expected float32"):
        in_float32(model_of(op, [], [half]))


def test_dialects_that_begin_in_different_ways(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"found ort, plain, expected dialects that cast the image first"):
        graphs.vision_graphs(checkpoint.config, [DIALECTS["ort"], DIALECTS["plain"]])


def structure(model: ir.Model) -> list[Any]:
    """Nodes with their attributes, where their inputs come from, and what their outputs are; no names of values.

    Floats as a file holds them, since a trace may come from one.
    """
    place: dict[ir.Value | None, Any] = {None: None}
    place |= {value: (value.name, str(value.type)) for value in model.graph.inputs}
    place |= {value: (value.name, str(value.type)) for value in model.graph.initializers.values()}
    found = []
    for i, node in enumerate(model.graph):
        attributes = {
            name: np.float32(a.value)
            if a.type == ir.AttributeType.FLOAT
            else a.value.numpy().tolist()
            if a.type == ir.AttributeType.TENSOR
            else a.value
            for name, a in node.attributes.items()
        }
        made = [(str(v.type), str(v.shape), v.name * v.is_graph_output()) for v in node.outputs]
        found.append((node.op_type, [place[value] for value in node.inputs], attributes, made))
        place |= {value: (i, j) for j, value in enumerate(node.outputs)}
    return found


@pytest.mark.parametrize(
    ("dialect", "precision"),
    usual_and_slow(
        [("ort", "fp32"), ("plain", "fp16"), ("standard", "bf16")],
        itertools.product(DIALECTS, ("fp32", "fp16", "bf16")),
    ),
)
def test_types_are_consistent(dialect: str, precision: str, tmp_path: Path) -> None:
    """Strict type inference accepts every graph, and what vision puts out is what language takes."""
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", precision=precision, dialect=dialect)
    models = {}
    for name in ("vision", "language"):
        models[name] = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(
            models[name], check_type=True, strict_mode=dialect != "ort"
        )
        onnx.checker.check_model(bundle / f"{name}.onnx") if dialect != "ort" else None
        assert {o.name for o in inferred.graph.output} == {o.name for o in models[name].graph.output}
    taken = {v.name: v.type.tensor_type.elem_type for v in models["language"].graph.input}
    given = {v.type.tensor_type.elem_type for v in models["vision"].graph.output}
    computed = precision if dialect != "ort" else "fp32"
    assert given == {taken["features"]} == {taken["key_0"]}
    assert given == {int(graphs.PRECISIONS[computed])}


def test_standard_vision_equals_ort(
    checkpoint: Checkpoint, tmp_path: Path, golden_pipe: ppexport.Pipeline
) -> None:
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", dialect="standard")
    session = ort.InferenceSession(bundle / "vision.onnx", providers=["CPUExecutionProvider"])
    path = IMAGES / "web_gnuplot.png"
    expected = golden_pipe.encode(path)
    pixels = prepare(path, 32, 65536, 600000)
    (features,) = session.run(None, {"image": pixels, "keep": expected.keep})
    assert relative_error(features[0], expected.embeds) < 1e-5
    assert relative_error(features[1:], expected.deepstack) < 1e-5
    with pytest.raises(ppexport.BundleError, match="has fp32 graphs of dialect standard, expected 'ort' for"):
        ppexport.load(bundle)


FLOATS, INTEGERS = ("FLOAT", "FLOAT16", "BFLOAT16"), ("INT32", "INT64")
TENSORRT_10_3 = {  # types -> operators, from onnx-tensorrt's docs/operators.md of release 10; opset 9 to 20
    (*FLOATS, *INTEGERS, "BOOL", "UINT8"): "Cast CastLike",
    (
        *FLOATS,
        *INTEGERS,
        "BOOL",
    ): "Concat Constant ConstantOfShape Expand Gather Identity Reshape Shape Slice Split "
    "Squeeze Transpose Unsqueeze Where",
    (
        *FLOATS,
        *INTEGERS,
    ): "Abs Add Div Equal Greater GreaterOrEqual Less LessOrEqual Loop Max Min Mul Range ReduceMax "
    "ReduceMean ReduceMin ReduceProd ReduceSum ScatterElements Sub TopK",
    FLOATS: "Ceil Clip Cos CumSum Floor Gelu Gemm LayerNormalization MatMul Pow Round Sigmoid Sin Softmax Sqrt",
    ("BOOL",): "And Not Or",
}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_plain_keeps_to_the_operators_of_tensorrt_10_3(precision: str, tmp_path: Path) -> None:
    """No operator and no type beyond the support table; uint8 images are cast before anything else."""
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", precision=precision, dialect="plain")
    for path in sorted(bundle.glob("*.onnx")):
        name, proto = path.stem, onnx.load(path, load_external_data=False)
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True))
        assert model.graph.opset_imports == {"": 20}
        for node in model.graph.all_nodes():
            first = node.inputs[0] if node.inputs else node.outputs[0]
            if node.op_type == "Where":
                first = node.inputs[1]
            kind = first.dtype.name if first.dtype else "INT64"  # type: ignore[union-attr]  # inside of a loop
            allowed = next((types for types, ops in TENSORRT_10_3.items() if node.op_type in ops.split()), ())
            assert kind in allowed, (name, node.op_type, kind)


def test_tracing_holds_no_weights(checkpoint: Checkpoint) -> None:
    model = graphs.language_graph(checkpoint.config, DIALECTS["ort"])
    table = checkpoint.family.weights(checkpoint.config)["language"]
    assert set(table) <= set(model.graph.initializers)
    precision = resolve(Wanted(), "fp32", "ort", False)
    attach(model, checkpoint, "language", checkpoint.family.preprocessing, DIALECTS["ort"], precision)
    lazy = {n for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.LazyTensor)}
    assert lazy == set(table)


def test_onnxruntime_fuses_the_norms(golden_bundle: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(golden_bundle / "language.onnx", options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph)
    fused = found["SimplifiedLayerNormalization"] + found["SkipSimplifiedLayerNormalization"]
    assert fused == 4 * 4 + 1  # two per layer, q and k norm, the last one
    assert found["Pow"] == 0


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 5e-3), ("bf16", 5e-2)])
def test_sixteen_bit_storage(
    precision: str, tolerance: float, tmp_path: Path, golden_pipe: ppexport.Pipeline
) -> None:
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", precision=precision)
    size = (bundle / "language.onnx.data").stat().st_size
    assert size < 0.6 * 2_904_064  # of the float32 bundle
    pipe = ppexport.load(bundle, max_pixels=600000)
    image = IMAGES / "web_gnuplot.png"
    expected, found = golden_pipe.encode(image), pipe.encode(image)
    assert 0 < relative_error(found.embeds, expected.embeds) < tolerance


def test_sixteen_bit_checkpoint_is_stored_without_loss(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """bf16 weights in a bf16 bundle give exactly what they give converted to float32."""
    wide = ppexport.load(build(tiny_checkpoint, tmp_path / "fp32", precision="fp32"))
    narrow = ppexport.load(tiny_bundle)
    assert (str(narrow.manifest.precision), str(wide.manifest.precision)) == ("bf16", "fp32")
    image = IMAGES / "web_gnuplot.png"
    np.testing.assert_array_equal(narrow.encode(image).embeds, wide.encode(image).embeds)
    a, b = (next(pipe.generate_tokens([1, 2, 3])).logits for pipe in (narrow, wide))
    np.testing.assert_array_equal(a, b)


def test_bundle_says_where_it_comes_from(golden_bundle: Path) -> None:
    import hashlib

    manifest = ppexport.load(golden_bundle).manifest
    source = GOLDEN / "e2e" / "model" / "model.safetensors"
    assert manifest.source.sha256[source.name] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert set(manifest.files) == {p.name for p in golden_bundle.iterdir()} - {"bundle.json"}
    assert manifest.versions["ppexport"] == ppexport.__version__
    assert manifest.interface == "tokens"
    assert manifest.stop_tokens == (2,)


def test_builds_are_repeatable(golden_bundle: Path, tmp_path: Path, traces: Traces) -> None:
    traces.anew()
    again = build(GOLDEN / "e2e" / "model", tmp_path / "bundle")
    first, second = (ppexport.load(path).manifest.files for path in (golden_bundle, again))
    assert first == second


def test_sums_and_their_norms_are_one_node_and_no_reshape_follows_another(tiny_bundle: Path) -> None:
    model = ir.load(tiny_bundle / "language.onnx")
    kinds = Counter(node.op_type for node in model.graph)
    layers = ppexport.load(tiny_bundle).manifest.model.text.layers
    assert kinds["SkipSimplifiedLayerNormalization"] >= 2 * layers - 1
    reshapes = [node for node in model.graph if node.op_type == "Reshape"]
    assert reshapes
    assert not [
        node for node in reshapes if any(user.op_type == "Reshape" for user, _ in node.outputs[0].uses())
    ]


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [([0, 0, 2, 4], [0, 0, 8], 0), ([6, 8], [2, 24], 1), ([6, 8], [0, 2, 4], 2), ([0, 24], [0, 4, 6], 1)],
)
def test_a_copied_size_is_not_lost_with_a_reshape(first: list[int], second: list[int], kept: int) -> None:
    x, op = ir.val("x", ir.DataType.FLOAT, [2, 3, 8]), Ops()
    middle = op("Reshape", x, op.ints(first))
    y = op("Reshape", middle, op.ints(second))
    out = op("Identity", y)
    values = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    shapes = [[n or values.shape[i] for i, n in enumerate(first)]]
    shapes += [[n or shapes[0][i] for i, n in enumerate(second)]]
    for value, shape, name in ((middle, shapes[0], "middle"), (y, shapes[1], "y"), (out, shapes[1], "out")):
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph([x], [out], nodes=op.nodes, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    one_reshape(model)
    graphs.clean(model)
    assert sum(node.op_type == "Reshape" for node in model.graph) == kept
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": values})[0], values.reshape(shapes[1]))


OPEN = """
import sys
import onnxruntime
for path in sys.argv[1:]:
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize(
    ("dialect", "precision"),
    [
        *(("ort", precision) for precision in ("fp32", "int4", "w8a8")),
        ("plain", "fp16"),
        *(("standard", precision) for precision in ("bf16", "int4")),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in RARE),
    ],
)
def test_every_graph_passes_the_checker_and_opens_without_a_warning(
    dialect: str, precision: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """As a user who opens a file of the bundle sees it: ONNX Runtime with its default settings."""
    files = sorted(
        build(tiny_checkpoint, tmp_path / "bundle", precision=precision, dialect=dialect).glob("*.onnx")
    )
    assert len(files) > 15
    if precision != "fp32":  # the pruning graphs are the same in all
        files = [file for file in files if not file.name.startswith("prune.")]
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
    if dialect != "ort" and precision in ("bf16", "int4"):
        return  # ONNX Runtime has no kernels in bfloat16 on a CPU
    if precision != "fp32":
        files = [file for file in files if file.name != "vision.openvino.onnx"]  # in bfloat16, too
    done = subprocess.run([sys.executable, "-c", OPEN, *map(str, files)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
