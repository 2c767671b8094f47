"""ONNX Runtime's CUDA provider without a GPU: its graphs by the kernels that it has, its backend on an emulation.

The emulation runs graphs with ONNX Runtime's CPU provider on the host memory that stands for the GPU's
(tests/emulator.py), when the stream gets to them. A run with the number of a CUDA graph that was captured before uses
the addresses of then, as a replay does.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from terminal import runner

import ppexport
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.exporters import graphs
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.exporters.lowering.dialects import DIALECTS
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.models.precision import Wanted
from ppexport.runtime.backends import ort_cuda
from ppexport.runtime.stats import Stats

REPOSITORY = Path(__file__).resolve().parent.parent
POCKET = REPOSITORY / "models" / "pocket"
SCREEN = REPOSITORY / "docs" / "settings.png"

# Operators with a CUDA kernel for the types that they get here; source: ONNX Runtime's docs/OperatorKernels.md
IN_16_BITS = {  # float16 and bfloat16
    *(
        "Add",
        "Cast",
        "Concat",
        "Div",
        "Expand",
        "Gather",
        "Gelu",
        "Gemm",
        "LayerNormalization",
        "MatMul",
        "Mul",
    ),
    *(
        "ReduceSum",
        "Reshape",
        "Sigmoid",
        "Softmax",
        "SimplifiedLayerNormalization",
        "Slice",
        "Squeeze",
        "Sub",
        "Transpose",
    ),
    *("Unsqueeze", "Where", "GroupQueryAttention", "MultiHeadAttention", "RotaryEmbedding", "QuickGelu"),
    "SkipSimplifiedLayerNormalization",
}
IN_FLOAT32 = {"Cos", "Exp", "Floor", "Neg", "Pow", "Reciprocal", "Sin", "Softplus", "Sqrt"}
HYBRID = {"CausalConvWithState", "LinearAttention"}  # both; by the names in the provider's library, 1.31.1
OF_INTEGERS = {
    "And",
    "CumSum",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "Max",
    "Min",
    "Mod",
    "Not",
    "Range",
    "ReduceMax",
}
ON_THE_HOST = {"Constant", "ReduceProd", "Shape"}  # sizes
INLINED = {"CastLike"}
MAY = IN_16_BITS | HYBRID | IN_FLOAT32 | OF_INTEGERS | ON_THE_HOST | INLINED
NARROW = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5", "llava"])
def test_every_operator_has_a_kernel(family: str, precision: str, tmp_path: Path) -> None:
    """On the GPU: an operator that has none there waits for the stream, and keeps CUDA graphs away."""
    config = random_config(family, "tiny")
    write_random(config, tmp_path)
    write_text_files(tmp_path, family)
    model = Checkpoint.open(tmp_path).config
    cuda = DIALECTS["cuda"]
    for made in (
        *graphs.vision_graphs(model, [cuda], precision),
        graphs.language_graph(model, cuda, precision),
    ):
        assert set(kinds(made)) <= MAY, sorted(set(kinds(made)) - MAY)
        for node in made.graph:
            if node.op_type in IN_FLOAT32 | OF_INTEGERS:
                assert not {value.dtype for value in node.inputs if value is not None} & NARROW, node


def test_the_decoder_has_few_operators(tmp_path: Path) -> None:
    """One for attention, one for a norm with the sum before it; 24 a layer, 7 of which only change a shape."""
    found = []
    for layers in (2, 3):
        config = random_config("qwen3_vl", "tiny")
        config["text_config"]["num_hidden_layers"] = layers
        write_random(config, tmp_path / str(layers))
        write_text_files(tmp_path / str(layers))
        model = Checkpoint.open(tmp_path / str(layers)).config
        found.append(kinds(graphs.language_graph(model, DIALECTS["cuda"], "bf16")))
    more = found[1] - found[0]
    assert more["GroupQueryAttention"] == 1
    assert more["MatMul"] == 7
    assert sum(more.values()) <= 24
    assert sum(more.values()) - more["Reshape"] <= 17


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class Binding:
    """An IOBinding, for "cuda"."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple] = {}
        self.outputs: dict[str, tuple] = {}

    def bind_input(self, name: str, device: str, number: int, dtype: int, shape: Any, pointer: int) -> None:
        assert (device, number) == ("cuda", 0)
        self.inputs[name] = (dtype, shape, pointer)

    def bind_output(self, name: str, device: str, number: int, dtype: int, shape: Any, pointer: int) -> None:
        assert (device, number) == ("cuda", 0)
        self.outputs[name] = (dtype, shape, pointer)


class Session:
    """An InferenceSession of the CUDA provider; ``api``: the emulated GPU."""

    refuse_graphs = ""
    fail_captures = False
    replays = 0

    def __init__(self, path: str, options: Any, providers: list[Any], api: emulator.Cuda):
        (name, settings), _ = providers
        assert name == ort_cuda.PROVIDER
        self.captures = settings["enable_cuda_graph"] == "1"
        if self.captures and Session.refuse_graphs:
            raise RuntimeError(Session.refuse_graphs)
        self.stream = int(settings["user_compute_stream"])
        self.api = api
        self.real = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.captured: dict[str, tuple[dict[str, tuple], dict[str, tuple]]] = {}

    def get_providers(self) -> list[str]:
        return [ort_cuda.PROVIDER, "CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        number = options.entries.get("gpu_graph_id", "-1")
        assert self.captures or number == "-1"
        bound = (dict(binding.inputs), dict(binding.outputs))
        if number != "-1" and Session.fail_captures:
            raise RuntimeError("capturing failed")
        if number != "-1":
            Session.replays += number in self.captured
            bound = self.captured.setdefault(number, bound)
        self.api.start(self.stream, lambda: self._run(*bound))

    def _run(self, inputs: dict[str, tuple], outputs: dict[str, tuple]) -> None:
        io = self.real.io_binding()
        for name, (dtype, shape, pointer) in inputs.items():
            io.bind_input(name, "cpu", 0, dtype, shape, pointer)
        for name, (dtype, shape, pointer) in outputs.items():
            io.bind_output(name, "cpu", 0, dtype, shape, pointer)
        self.real.run_with_iobinding(io)


@pytest.fixture(scope="module")
def gpu() -> Iterator[emulator.Cuda]:
    with emulator.installed("tensorrt") as api, pytest.MonkeyPatch.context() as patch:
        module = types.SimpleNamespace(
            __version__="1.31.1",
            get_available_providers=lambda: [ort_cuda.PROVIDER, "CPUExecutionProvider"],
            preload_dlls=lambda: print("Failed to load libcublas.so.13"),
            SessionOptions=ort.SessionOptions,
            RunOptions=RunOptions,
            InferenceSession=lambda path, options, providers: Session(path, options, providers, api),
        )
        patch.setattr(ort_cuda, "import_onnxruntime", lambda device: module)
        yield api


PRUNE = [ppexport.PixelPrune(), ppexport.PruneSID(60)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(POCKET, tmp_path_factory.mktemp("cuda") / "bundle", "fp16", "cuda", prune=PRUNE)


def answers(pipe: ppexport.Pipeline, stats: Stats | None = None) -> list[str]:
    asked = ("What is the Region?", "What is the Brightness?")
    return [pipe.generate(question, SCREEN, ppexport.PixelPrune()).text() for question in asked]


def test_answers(gpu: emulator.Cuda, bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As on a CPU, where the same bundle runs, too. What CUDA's libraries say is not in the way."""
    expected = ["Porto", "46%"]
    with ppexport.load(bundle, "cuda") as pipe:
        assert answers(pipe) == expected
        found = pipe.encode(SCREEN)
        assert pipe.backend.name == "onnxruntime-cuda 1.31.1"
    with ppexport.load(bundle, "cpu") as pipe:
        assert answers(pipe) == expected
        np.testing.assert_array_equal(pipe.encode(SCREEN).keep, found.keep)
    assert "libcublas" not in capfd.readouterr().out


@pytest.mark.parametrize("kind", [("cuda", "int4"), ("cuda", "int8"), ("plain", "fp16")], ids="-".join)
def test_other_bundles(gpu: emulator.Cuda, kind: tuple[str, str], tmp_path: Path) -> None:
    dialect, precision = kind
    path = build(POCKET, tmp_path / "bundle", precision, dialect)
    with ppexport.load(path, "cuda") as pipe:
        assert answers(pipe) == ["Porto", "46%"]


def test_decode_replays_a_graph(gpu: emulator.Cuda, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third token on, for as long as nothing moves; a second sequence does not get the first one's."""
    with ppexport.load(bundle, "cuda") as pipe:
        ids = [[5, 6, 7, 8], [9, 10, 11]]
        alone = [[s.token for s in pipe.generate_tokens(i, max_new_tokens=12, stop=())] for i in ids]
        Session.replays = 0
        steps = [pipe.generate_tokens(i, max_new_tokens=12, stop=()) for i in ids]
        found: list[list[int]] = [[], []]
        for turn in (0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1):
            found[turn].append(next(steps[turn]).token)
        assert found == alone
        assert Session.replays >= 12
    for name, value in ((ort_cuda, "MOST_GRAPHS"), 0), ((Session, "fail_captures"), True):
        with monkeypatch.context() as patch, ppexport.load(bundle, "cuda") as pipe:
            patch.setattr(*name, value)
            stats = [Stats(), Stats()]
            for each in stats:
                steps = pipe.generate_tokens(ids[0], max_new_tokens=12, stop=(), stats=each)
                assert [s.token for s in steps] == alone[0]
            assert [len(each.notes) for each in stats] == [1, 0]
            assert "decode goes on without CUDA graphs" in stats[0].notes[0]


def test_graphs_that_cannot_be(gpu: emulator.Cuda, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs without, and says so once."""
    monkeypatch.setattr(Session, "refuse_graphs", "nodes on the CPU")
    with ppexport.load(bundle, "cuda") as pipe:
        stats = [Stats(), Stats()]
        for each in stats:
            list(pipe.generate_tokens([5, 6, 7], max_new_tokens=3, stats=each))
    assert [len(each.notes) for each in stats] == [1, 0]
    assert "without a CUDA graph, somewhat slower: " in stats[0].notes[0]
    assert "nodes on the CPU" in stats[0].notes[0]


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(wanted: Wanted, message: str) -> None:
        with pytest.raises(ppexport.CheckpointError, match=message):
            build(POCKET, tmp_path / "bundle", wanted, "cuda")

    refused(Wanted("fp32"), "dialect cuda is in 16 bits, expected fp16 or bf16")
    refused(Wanted("w8a8"), r"w8a8 is for CPUs \(dialect ort\), expected int8 or int4")
    refused(Wanted("bf16", head="int8"), "found integers beside bf16, expected fp16 for dialect cuda")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_for_cpus_on_cuda(pocket_bundle: Path) -> None:
    result = runner().invoke(
        main, ["run", str(pocket_bundle), "-i", str(SCREEN), "What?", "--device", "cuda"]
    )
    assert result.exit_code != 0
    assert "has fp32 graphs of dialect ort, expected 'cuda' (or 'plain') for CUDA" in result.output
    assert "--dialect cuda" in result.output
