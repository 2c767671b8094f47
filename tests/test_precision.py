"""Weights in groups of int8 and int4: the arithmetic, the graphs, the engines."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import emulator
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import E2E_PIXELS, GOLDEN, IMAGES, usual_and_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import relative_error
from terminal import runner

import ppexport
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.exporters.lowering.onnx_writer import Ops
from ppexport.exporters.weights.quantize import dequantize, integer_type, quantize
from ppexport.exporters.weights.quantized_nodes import LEAST, round_rows
from ppexport.models import engine_record
from ppexport.models.precision import Precision, Wanted, resolve
from ppexport.runtime.bundle import open_bundle
from ppexport.trt_build import Options
from ppexport.verify import verify_device

MODEL = GOLDEN / "e2e" / "model"
POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"


def matrix(seed: int, inner: int = 256, outer: int = 48, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(inner, outer, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    signed=st.booleans(),
    scale=st.sampled_from([1e-6, 0.02, 300.0]),
)
def test_no_value_is_further_off_than_its_block_allows(
    seed: int, bits: int, size: int, symmetric: bool, signed: bool, scale: float
) -> None:
    weights = matrix(seed, scale=scale)
    q = quantize(weights, bits, size, symmetric, signed=signed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert low <= q.values.min() <= q.values.max() <= high
    error = np.abs(dequantize(q) - weights.numpy()).reshape(-1, size, weights.shape[1])
    largest = np.abs(weights.numpy()).reshape(error.shape).max(1, keepdims=True)
    assert (error <= largest * (0.3 if bits == 4 else 0.02)).all()


def test_zeros_and_single_values_are_exact() -> None:
    weights = torch.zeros(64, 4)
    weights[:32, 1] = 3.5
    weights[5, 2] = -7.0
    for bits in (4, 8):
        np.testing.assert_array_equal(dequantize(quantize(weights, bits, 32, True)), weights.numpy())


def test_the_fit_beats_rounding_by_the_largest_magnitude() -> None:
    """Mean squared error of int4 on weights as models have them: normal, and with a few outliers."""
    for tail in (0, 8):
        weights = matrix(1, 2048, 64)
        weights[torch.rand(weights.shape, generator=torch.Generator().manual_seed(2)) < 0.002] *= tail or 1
        blocks = weights.reshape(-1, 32, 64)
        scale = blocks.abs().amax(1, keepdim=True) / 7
        nearest = ((blocks / scale).round().clamp(-8, 7) * scale - blocks).square().mean()
        for signed, share in ((False, 0.9), (True, 0.85)):
            found = dequantize(quantize(weights, 4, 32, True, signed=signed))
            assert (torch.from_numpy(found) - weights).square().mean() < share * nearest
            assert signed or quantize(weights, 4, 32, True).scales.min() > 0  # as TensorRT wants them


@pytest.mark.parametrize("stored", ["int8", "int4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_graph_computes_what_was_fitted(stored: str, symmetric: bool) -> None:
    weights = matrix(3)
    q = quantize(weights, 8 if stored == "int8" else 4, 64, symmetric)
    kind, op = integer_type(stored, symmetric), Ops()
    arrays = [q.values.astype(kind.numpy()), q.scales]
    arrays += [] if q.zeros is None else [q.zeros.astype(kind.numpy())]
    values = [ir.val(f"v{i}", const_value=ir.Tensor(a, name=f"v{i}")) for i, a in enumerate(arrays)]
    out = op("DequantizeLinear", *values, axis=0, block_size=64)
    out.name, out.type, out.shape = "out", ir.TensorType(ir.DataType.FLOAT), ir.Shape(weights.shape)
    graph = ir.Graph([], [out], nodes=op.nodes, initializers=values, opset_imports={"": 21}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    (found,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {})
    np.testing.assert_allclose(found, dequantize(q), rtol=1e-6)


# features (w8a8 in all), logits of random weights
LIMITS = {"int8": (0.03, 0.03), "int4": (0.03, 0.35), "w8a8": (0.03, 0.04)}


@pytest.mark.parametrize(
    ("stored", "block", "symmetric"),
    [("int8", 32, True), ("int4", 32, True), ("int4", 32, False), ("w8a8", 32, True)],
)
def test_bundles_stay_close_to_float32(stored: str, block: int, symmetric: bool, tmp_path: Path) -> None:
    wide = ppexport.load(build(MODEL, tmp_path / "wide", "fp32"), max_pixels=E2E_PIXELS)
    path = build(MODEL, tmp_path / "narrow", Wanted(stored, group_size=block, symmetric=symmetric))
    narrow = ppexport.load(path, max_pixels=E2E_PIXELS)
    image, ids = IMAGES / "web_gnuplot.png", np.load(GOLDEN / "e2e" / "one_tau0.npz")["input_ids"]
    features, logits = LIMITS[stored]
    assert relative_error(narrow.encode(image).embeds, wide.encode(image).embeds) < features
    first, second = (next(pipe.generate_tokens(ids, [image])).logits for pipe in (wide, narrow))
    assert 0 < relative_error(second, first) < logits
    weights = sum(f.bytes for name, f in narrow.manifest.files.items() if name.endswith(".data"))
    assert weights < 0.6 * sum(f.bytes for name, f in wide.manifest.files.items() if name.endswith(".data"))


PRODUCTS = {"vision": 4 * 4 + 2 * 3, "language": 6 * 7 + 1}  # of the pocket model, the head included


def optimized(graph: Path, tmp_path: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )


@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_onnx_runtime_fuses_every_product(stored: str, tmp_path: Path) -> None:
    """MatMulNBits for all matrices, nothing dequantized but the rows of the token table."""
    path = build(POCKET, tmp_path / "bundle", Wanted(stored, vision=stored))
    for name, products in PRODUCTS.items():
        kinds = optimized(path / f"{name}.onnx", tmp_path)
        assert kinds["MatMulNBits"] == products
        assert kinds["DequantizeLinear"] == (1 if name == "language" else 0)


def test_products_of_integers(tmp_path: Path) -> None:
    """w8a8: every matrix but the head is multiplied in integers; what several products read is rounded once."""
    path = build(POCKET, tmp_path / "bundle", "w8a8")
    vision, language = (optimized(path / f"{name}.onnx", tmp_path) for name in PRODUCTS)
    assert vision["MatMulIntegerToFloat"] == vision["QuantizeLinear"] == PRODUCTS["vision"]
    assert (language["MatMulIntegerToFloat"], language["MatMulNBits"]) == (PRODUCTS["language"] - 1, 1)
    assert language["QuantizeLinear"] == 6 * 4  # read by q k v, o, gate up, down


def test_inputs_are_rounded_row_by_row() -> None:
    """By the value farthest from 0, on either side of it; a row of zeros stays one."""
    op = Ops()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, 3]))
    same = op("Identity", x)
    same.name, same.type = "same", x.type
    model = ir.Model(ir.Graph([x], [], nodes=op.nodes, opset_imports={"": 21}), ir_version=10)
    model.graph.outputs.extend(round_rows(model, same))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rows = np.array([[-4, 1, 2], [3, -1, 0], [0, 0, 0], [1e-3, 0, -1e-3]], np.float32)
    integers, scales = session.run(None, {"x": rows})
    assert integers.tolist() == [[1, 160, 192], [255, 86, 128], [128] * 3, [255, 128, 1]]
    assert np.allclose(scales[:, 0], [4 / 127, 3 / 127, LEAST, 1e-3 / 127])
    assert np.float16(LEAST) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("fpu avx2 avx512f", "found a CPU without VNNI"),
        ("fpu avx2 avx_vnni", ""),
        ("fpu avx512_vnni", ""),
        (None, ""),
    ],
)
def test_a_cpu_that_saturates_is_refused(
    flags: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older x86 CPUs add two products in 16 bits. None: a machine that does not say (ARM adds in 32)."""
    path, listed = build(POCKET, tmp_path / "bundle", "w8a8"), tmp_path / "cpuinfo"
    listed.write_text("" if flags is None else f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr("ppexport.runtime.backends.processor.CPUINFO", listed)
    if message:
        with pytest.raises(ppexport.BackendError, match=f"w8a8.*{message}.*--precision int8"):
            ppexport.load(path)
    else:
        ppexport.load(path)


@pytest.mark.parametrize(
    ("dialect", "stored"),
    usual_and_slow([("standard", "int4")], itertools.product(("standard", "plain"), ("int4", "int8"))),
)
def test_engines_of_quantized_graphs_compile(dialect: str, stored: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    options = Options(capacity=256, max_pixels=65536, compute_capabilities=("8.9",))
    path = build(POCKET, tmp_path / "bundle", stored, dialect, ["tensorrt-rtx"], None, options)
    _, manifest = open_bundle(path)
    record = engine_record.read(path, manifest, "tensorrt-rtx")
    scales = {"int4": "groups of 32", "int8": "int8 with a scale per output"}
    assert str(manifest.precision) == f"{stored}, vision bf16, embedding bf16, {scales[stored]}"
    assert record.engines["language"].bytes > 100_000


@pytest.mark.parametrize(
    ("wanted", "dialect", "tied", "message"),
    [
        (Wanted("int3"), "ort", False, "precision is 'int3', expected auto, fp32, fp16, bf16, int8, int4"),
        (Wanted(vision="int2"), "ort", False, "vision precision is 'int2'"),
        (Wanted("int4", group_size=48), "ort", False, "group size is 48, expected one of: 32, 64, 128"),
        (
            Wanted("int4", embedding="int4"),
            "ort",
            False,
            "embedding cannot be stored in int4, expected int8 or bf16",
        ),
        (
            Wanted("int4", embedding="int8"),
            "standard",
            False,
            "embedding cannot be stored in int8, expected bf16",
        ),
        (Wanted("bf16", embedding="int8"), "ort", True, "they are one table in this checkpoint"),
        (
            Wanted("int4", vision="fp16", embedding="bf16"),
            "standard",
            False,
            "found bf16 and fp16, expected fp16 only",
        ),
        (
            Wanted("bf16", group_size=64),
            "ort",
            False,
            "group size and asymmetric are for int8 and int4, found bf16",
        ),
        (
            Wanted("w8a8", head="bf16", embedding="bf16", symmetric=False),
            "ort",
            True,
            "found w8a8, head bf16",
        ),
        (Wanted("w8a8"), "standard", False, "w8a8 is for CPUs"),
        (Wanted("int4", symmetric=False), "plain", False, "TensorRT takes no zero points"),
        (
            Wanted("int8", group_size=64),
            "plain",
            False,
            r"are for int4 \(int8 has a scale per output for engines\), found int8",
        ),
    ],
)
def test_what_cannot_be_stored(wanted: Wanted, dialect: str, tied: bool, message: str) -> None:
    with pytest.raises(ppexport.CheckpointError, match=message):
        resolve(wanted, "bf16", dialect, tied)


def test_what_goes_with_what() -> None:
    assert resolve(Wanted(), "bf16", "ort", True) == Precision("bf16", "bf16", "bf16", "bf16", "bf16")
    assert str(resolve(Wanted("int4"), "bf16", "ort", True)) == (
        "int4, vision w8a8, head int8, embedding int8, groups of 32"
    )
    assert (
        str(resolve(Wanted("int4"), "fp32", "standard", False))
        == "int4, vision bf16, embedding bf16, groups of 32"
    )
    assert str(resolve(Wanted("bf16", head="fp32"), "bf16", "ort", True)) == "bf16, head fp32, embedding fp32"
    assert str(resolve(Wanted(vision="bf16"), "fp32", "standard", False, engines=True)) == "bf16"
    assert str(resolve(Wanted(), "fp32", "plain", False)) == "fp32"
    assert str(resolve(Wanted("int8", symmetric=False, group_size=64), "bf16", "ort", False)) == (
        "int8, vision w8a8, groups of 64 with zero points"
    )


def test_matrices_that_blocks_do_not_divide_are_told(tmp_path: Path) -> None:
    """Width 192: of every layer all but the down projection, and the table, which is the head, too."""
    result = runner().invoke(
        main, ["build", str(POCKET), "-o", str(tmp_path / "b"), "--precision", "int4", "--group-size", "128"]
    )
    assert result.exit_code == 0, result.output
    notice = f"notice: {6 * 6 + 2} matrices stay in bf16: groups of 128 do not divide their inputs"
    assert notice in " ".join(result.stderr.split())


def test_options_of_the_command(tmp_path: Path) -> None:
    options = [
        "--precision",
        "int4",
        "--vision-precision",
        "bf16",
        "--head-precision",
        "int4",
        "--group-size",
        "64",
    ]
    result = runner().invoke(main, ["build", str(POCKET), "-o", str(tmp_path / "b"), *options])
    assert result.exit_code == 0, result.output
    assert "int4, vision bf16, embedding int8, groups of 64" in " ".join(result.stderr.split())
    answer = runner().invoke(
        main, ["run", str(tmp_path / "b"), "What is the Region?", "-i", "docs/settings.png"]
    )
    assert answer.stdout == "Porto\n"


@pytest.mark.parametrize("stored", ["int4", "int8"])
def test_engines_of_quantized_graphs_answer(stored: str, tmp_path: Path) -> None:
    """On the emulated GPU, and the same graphs on the CPU: what is in no integers is in fp16."""
    with emulator.installed("tensorrt"):
        options = Options(capacity=512)
        wanted = Wanted(stored, vision="fp16")
        path = build(POCKET, tmp_path / "bundle", wanted, "plain", ["tensorrt"], None, options)
        screen = POCKET.parent.parent / "docs" / "settings.png"
        with ppexport.load(path, "tensorrt") as pipe:
            assert pipe.generate("What is the Region?", screen).text() == "Porto"
        assert not verify_device(path, "tensorrt", [str(screen)], tokens=6).problems(0.99, 0.05, 0.9)
