"""What TensorRT-RTX makes of the graphs, by the list of kernels in its own log: nothing has to run, so no GPU.

At the dimensions of Qwen3-VL-2B with two layers and a small vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import usual_and_slow

from ppexport.build_bundle import build
from ppexport.compile_bundle import all_int4
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.models import profiles
from ppexport.models.precision import Wanted
from ppexport.models.progress import silent
from ppexport.onnx_dims import set_axis
from ppexport.runtime.bundle import open_bundle
from ppexport.trt_build import Options, compile_graph, prepare

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: it has libraries for x86-64 only"
)
RTX = "tensorrt-rtx"
LAYERS = 2
CAPACITY = 2048
MOST_KERNELS = 34  # of the decoder, all of it, for prompts as for tokens
EXPANSION = "Repl"  # of one that copies keys for every query head that shares them
KERNEL_BYTES = 8 << 20  # of all kernels, whatever the number of layers: under 0.05 of the weights of all 28
ATTENTION = "mha"  # in the name of a kernel that keeps no scores in memory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mini") / "checkpoint"
    config = random_config("qwen3_vl", "2b")
    config["text_config"] |= {"num_hidden_layers": LAYERS, "vocab_size": 2048}
    config["vision_config"] |= {"depth": LAYERS, "deepstack_visual_indexes": [0]}
    write_random(config, directory)
    write_text_files(directory)
    return directory


def compiled(bundle: Path, graph: str, work: Path) -> tuple[list[str], int, int]:
    """The kernels of an engine, its bytes and those of its weights."""
    trt, options = prepare(RTX, Options(compute_capabilities=("8.9",)))
    directory, manifest = open_bundle(bundle)
    dialect = manifest.graphs[graph].dialect
    sizes = profiles.defaults(manifest.model, manifest.context, 1 << 20, CAPACITY)
    listed = profiles.engine_profiles(sizes, manifest.model, graph, dialect, all_int4(manifest.precision))
    source = directory / manifest.graphs[graph].file
    model = source.read_bytes()
    if graph == "language" and dialect == "standard":
        model = set_axis(model, "M", CAPACITY)
    kernels: list[str] = []
    engine = work / f"{graph}.engine"
    compile_graph(trt, RTX, graph, model, source, listed, options, silent, engine, kernels)
    weights = sum(file.stat().st_size for file in directory.glob(f"{source.stem}*"))
    return kernels, engine.stat().st_size, weights


@pytest.fixture(scope="module", params=["standard", "plain"])
def bundle(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build(
        checkpoint, tmp_path_factory.mktemp("mini") / "bundle", dialect=request.param, precision="bf16"
    )


def test_the_decoder(bundle: Path, tmp_path: Path) -> None:
    """One kernel of attention in each layer for prompts and tokens alike, and few others; weights are there once."""
    kernels, engine, weights = compiled(bundle, "language", tmp_path)
    assert sum(ATTENTION in kernel for kernel in kernels) == 2 * LAYERS, kernels
    assert len(kernels) <= 2 * MOST_KERNELS, kernels
    assert not [kernel for kernel in kernels if EXPANSION in kernel]
    assert engine < 1.05 * weights


def test_the_tower(bundle: Path, tmp_path: Path) -> None:
    kernels, engine, weights = compiled(bundle, "vision", tmp_path)
    assert sum(ATTENTION in kernel for kernel in kernels) == LAYERS, kernels
    assert engine < 1.05 * weights


@pytest.mark.parametrize("dialect", usual_and_slow(["plain"], ["plain", "standard"]))
@pytest.mark.parametrize("stored", [Wanted("int4"), Wanted("int8"), Wanted("int4", head="int8")], ids=str)
def test_weights_in_integers(dialect: str, stored: Wanted, checkpoint: Path, tmp_path: Path) -> None:
    """Every product is one kernel that reads the integers: none expands a matrix to 16 bits first."""
    bundle = build(checkpoint, tmp_path / "bundle", stored, dialect)
    kernels, engine, weights = compiled(bundle, "language", tmp_path)
    assert sum(ATTENTION in kernel for kernel in kernels) == 2 * LAYERS, kernels
    # of int8 q, k and v are one, gate and up too, as the compiler makes them of int4
    assert sum("MulCastFc" in kernel for kernel in kernels) == 2 * (4 * LAYERS + 1), kernels
    assert not [kernel for kernel in kernels if kernel.startswith("gemm")]
    assert len(kernels) <= 2 * (MOST_KERNELS + 4), kernels
    assert engine - weights < KERNEL_BYTES


def test_a_decoder_in_fp16(checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(checkpoint, tmp_path / "bundle", "fp16", "plain")
    kernels, engine, weights = compiled(bundle, "language", tmp_path)
    assert sum(ATTENTION in kernel for kernel in kernels) == 2 * LAYERS, kernels
    assert engine < 1.05 * weights
