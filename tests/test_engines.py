"""Compiling with the real TensorRT-RTX, which needs no GPU for it: every graph, precision and dialect."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import usual_and_slow
from terminal import runner

import ppexport
from ppexport.build_bundle import build, compile_in_place
from ppexport.cli import main
from ppexport.compile_bundle import compile_bundle
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.models import engine_record, profiles
from ppexport.models.manifest import Manifest
from ppexport.onnx_dims import set_axis
from ppexport.runtime.bundle import open_bundle
from ppexport.trt_build import Options

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: it has libraries for x86-64 only"
)
RTX = "tensorrt-rtx"
SMALL = Options(capacity=256, max_pixels=256 * 256, compute_capabilities=("8.9",))
KINDS = [(dialect, precision) for dialect in ("standard", "plain") for precision in ("bf16", "fp16")]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a layer more than deepstack levels, as every real model: TensorRT-RTX 1.7 cannot compile it without."""
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    config = random_config("qwen3_vl", "tiny")
    config["text_config"]["num_hidden_layers"] = 3
    write_random(config, directory)
    write_text_files(directory)
    return directory


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    directory = tmp_path_factory.mktemp("bundles")
    return {
        kind: build(tiny_checkpoint, directory / "-".join(kind), dialect=kind[0], precision=kind[1])
        for kind in KINDS
    }


@pytest.fixture
def bundle(bundles: dict[tuple[str, str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(
        bundles["standard", "bf16"], tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")
    )


def several(manifest: Manifest) -> profiles.Profiles:
    """Two buckets for vision and prefill."""
    one = profiles.defaults(manifest.model, manifest.context, 256 * 256, 256)
    vision = one.vision[0]
    return dataclasses.replace(
        one,
        vision=({**vision, "K": (1, 8, 16)}, {**vision, "K": (1, 40, 64)}),
        prefill=({"S": (1, 24, 64), "K": (1, 8, 16)}, {"S": (1, 80, 256), "K": (1, 40, 64)}),
    )


@pytest.mark.parametrize(
    ("kind", "buckets"),
    usual_and_slow(
        [(KINDS[0], "one"), (KINDS[1], "several"), (KINDS[2], "several"), (KINDS[3], "one")],
        itertools.product(KINDS, ("one", "several")),
    ),
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_graph_compiles(
    bundles: dict[tuple[str, str], Path], kind: tuple[str, str], buckets: str
) -> None:
    bundle = bundles[kind]
    _, manifest = open_bundle(bundle)
    sizes = None if buckets == "one" else several(manifest)
    options = SMALL
    if buckets == "one":  # what is compiled for where nobody says
        options = dataclasses.replace(options, compute_capabilities=Options().compute_capabilities)
    seen: dict[str, int] = {}
    compile_bundle(
        bundle, RTX, sizes, options, lambda stage, done, total: seen.update({stage.split(":")[0]: total})
    )
    record = engine_record.read(bundle, manifest, RTX)
    for graph in ("prune", "vision", "language"):
        engine = record.engines[graph]
        assert (engine_record.folder(bundle, RTX) / engine.file).stat().st_size == engine.bytes > 10_000
        assert engine.build_seconds > 0
        assert seen[f"compile {graph}"] > 1
    counts = [len(record.engines[graph].profiles) for graph in ("prune", "vision", "language")]
    expected = {"one": [1, 1, 2], "several": [1, 2, 3]}
    assert counts == expected[buckets]  # the last one of language is decode
    assert record.engines["language"].profiles[-1]["S"] == (1, 1, 2)
    assert record.engines["language"].profiles[0]["B"] == (1, 1, 1)
    assert ("M" in record.engines["language"].profiles[0]) == (kind[0] == "plain")
    assert (record.target, record.dialect, record.precision) == (RTX, *kind)
    assert record.version.startswith("1.")
    assert record.flags == ("STRONGLY_TYPED",)
    usual = ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert record.compute_capabilities == (usual if buckets == "one" else ("8.9",))
    assert record.peak_memory > 0
    assert record.build_seconds >= sum(engine.build_seconds for engine in record.engines.values())
    assert [p.name for p in (bundle / "engines").iterdir()] == [RTX]


def test_build_from_a_checkpoint_with_options(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One command exports and compiles; the options are in the record."""
    output = tmp_path / "bundle"
    arguments = ["build", str(tiny_checkpoint), "-o", str(output), "--target", RTX, "--capacity", "128"]
    arguments += ["--max-pixels", "65536", "--workspace", "64", "--compute-capability", "8.9"]
    arguments += ["--prunesid", "16"]
    result = runner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "engines for 128 tokens, images of up to 64 kept tokens" in result.stderr
    assert "on the device (weights" in result.stderr
    assert re.search(r"tensorrt-rtx language +[\d.]+ MB +of [\d.]+ MB of graph and weights", result.stderr)
    _, manifest = open_bundle(output)
    record = engine_record.read(output, manifest, RTX)
    assert {graph.dialect for graph in manifest.graphs.values()} == {"standard"}
    assert (record.profiles.capacity, record.workspace) == (128, 64 << 20)
    assert record.compute_capabilities == ("8.9",)
    pruning = {"prune", "prunesid.qwen", "prunesid.information"}
    assert set(record.engines) == {"vision", "language", *pruning}
    assert all(record.engines[name].bytes > 10_000 for name in pruning)
    assert record.engines["prunesid.qwen"].axes["features"] == ("", "K", "")
    assert not [p for p in tmp_path.iterdir() if p != output]


def test_profiles_from_a_file(bundle: Path, tmp_path: Path) -> None:
    sizes = several(open_bundle(bundle)[1])
    profiles.write(sizes, tmp_path / "profiles.json")
    arguments = ["build", str(bundle), "--target", RTX, "--profiles", str(tmp_path / "profiles.json"), "-q"]
    result = runner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert engine_record.read(bundle, open_bundle(bundle)[1], RTX).profiles == sizes
    result = runner().invoke(main, [*arguments, "--capacity", "64"])
    assert result.exit_code == 2
    assert "--capacity is in the profile file" in result.output


@pytest.mark.slow
def test_a_float32_checkpoint_is_compiled_in_bf16(tmp_path: Path) -> None:
    from conftest import GOLDEN

    build(GOLDEN / "e2e" / "model", tmp_path / "bundle", targets=[RTX], options=SMALL)
    assert open_bundle(tmp_path / "bundle")[1].compute == "bf16"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"dialect": "ort"}, "found graphs of dialect ort, expected standard"),
        (
            {"dialect": "standard", "precision": "fp32"},
            "found graphs that calculate in fp32, expected bf16 or fp16",
        ),
    ],
)
def test_graphs_that_are_not_for_tensorrt(
    kind: dict, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = build(tiny_checkpoint, tmp_path / "bundle", **kind)
    with pytest.raises(ppexport.BundleError, match=message):
        compile_bundle(bundle, RTX, None, SMALL)
    with pytest.raises(ppexport.BundleError, match=message):
        build(tiny_checkpoint, tmp_path / "other", targets=[RTX], **kind)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert not (bundle / "engines").exists()


def test_a_refused_graph_is_quoted_and_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph with NonZero needs a plugin; the engines that were there stay."""
    compile_bundle(bundle, RTX, None, SMALL)
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    model = onnx.load(bundle / "pixelprune.pred_2d.max.onnx")
    node = onnx.helper.make_node("NonZero", ["image_f"], ["order64"])
    model.graph.node.extend(
        [onnx.helper.make_node("Cast", ["image"], ["image_f"], to=onnx.TensorProto.FLOAT), node]
    )
    model.graph.node.append(onnx.helper.make_node("Cast", ["order64"], ["order"], to=onnx.TensorProto.INT32))
    for old in model.graph.node:
        if old.op_type != "Cast":
            old.output[:] = [f"{name}_old" if name == "order" else name for name in old.output]
    broken = model.SerializeToString()
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: broken if path.name == "pixelprune.pred_2d.max.onnx" else read(path)
    )
    with pytest.raises(
        ppexport.BackendError, match=r"tensorrt-rtx 1\.\d.* refuses the prune graph: .*NonZero"
    ):
        compile_bundle(bundle, RTX, None, SMALL)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before


def test_a_failing_compilation_is_quoted(bundle: Path) -> None:
    """And a cache has to hold the longest prompt."""
    sizes = several(open_bundle(bundle)[1])
    wrong = dataclasses.replace(sizes, prefill=({"S": (1, 300, 300), "K": (1, 1, 2)},))
    with pytest.raises(
        ppexport.RequestError, match=r"prefill\[0\].S goes to 300, expected at most 256 \(capacity\)"
    ):
        compile_bundle(bundle, RTX, wrong)
    with pytest.raises(
        ppexport.BackendError, match=r"could not compile .*OutOfMemory.* more --workspace may help"
    ):
        compile_bundle(bundle, RTX, sizes, dataclasses.replace(SMALL, workspace=1))
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize("stage", ["compile prune", "compile language"])
def test_interrupting_leaves_the_bundle_as_it_was(bundle: Path, stage: str) -> None:
    def progress(now: str, done: int, total: int) -> None:
        if now.startswith(stage):
            raise KeyboardInterrupt

    before = sorted(bundle.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(bundle, RTX, None, SMALL, progress)
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling(bundle: Path, sent: signal.Signals) -> None:
    """Wherever it arrives, in the compiler or in our own lines: one word, its exit code, the bundle as it was."""
    before = sorted(bundle.rglob("*"))
    command = [sys.executable, "-m", "ppexport.cli", "build", str(bundle), "--target", RTX]
    # started in the background by a shell, this process would hand on that SIGINT is ignored
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    while "compile" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert "Aborted!" in err
    assert "Traceback" not in err
    assert sorted(bundle.rglob("*")) == before


def test_targets_are_checked_before_the_first_replaces_anything(bundle: Path) -> None:
    compile_bundle(bundle, RTX, None, SMALL)
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    with pytest.raises(ppexport.BackendError, match="tensorrt cannot be imported"):
        compile_in_place(bundle, [RTX, "tensorrt"], None, SMALL)
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before


def test_records_that_do_not_fit_their_engines(bundle: Path) -> None:
    compile_bundle(bundle, RTX, None, SMALL)
    _, manifest = open_bundle(bundle)
    path = engine_record.folder(bundle, RTX) / "record.json"
    right = json.loads(path.read_text())
    for change in ({"file": "../../bundle.json"}, {"profiles": []}, {"axes": {"image": ["Q"]}}):
        wrong = json.loads(json.dumps(right))
        wrong["engines"]["vision"] |= change
        path.write_text(json.dumps(wrong))
        with pytest.raises(
            ppexport.BundleError, match=r"record.json: .*vision engine .*; run: ppexport build"
        ):
            engine_record.read(bundle, manifest, RTX)


def test_sizes_that_no_image_of_the_model_has(bundle: Path) -> None:
    with pytest.raises(
        ppexport.RequestError, match="max_pixels is 4096, expected at least 65536: the model enlarges"
    ):
        compile_bundle(bundle, RTX, None, Options(max_pixels=4096))


def test_records_are_checked(bundle: Path, bundles: dict[tuple[str, str], Path]) -> None:
    _, manifest = open_bundle(bundle)
    with pytest.raises(
        ppexport.BundleError, match="has no engines for tensorrt-rtx; run: ppexport build .* --target"
    ):
        engine_record.read(bundle, manifest, RTX)
    compile_bundle(bundle, RTX, None, SMALL)
    folder = engine_record.folder(bundle, RTX)
    with pytest.raises(
        ppexport.BundleError, match="compiled from other graphs than the bundle's; run: ppexport build"
    ):
        engine_record.read(bundle, open_bundle(bundles["plain", "bf16"])[1], RTX)
    (folder / "vision.engine").write_bytes(b"short")
    with pytest.raises(
        ppexport.BundleError, match=r"vision.engine: found 5 bytes, expected \d+; run: ppexport build"
    ):
        engine_record.read(bundle, manifest, RTX)
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "schema": 99}))
    with pytest.raises(ppexport.BundleError, match="found schema 99"):
        engine_record.read(bundle, manifest, RTX)
    (folder / "record.json").write_text("{")
    with pytest.raises(ppexport.BundleError, match=r"record.json: is damaged .*; run: ppexport build"):
        engine_record.read(bundle, manifest, RTX)


def test_options_that_do_not_fit_a_target(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ppexport.RequestError, match=r"compute capability is '1.0', expected some of: .*8.9"):
        compile_bundle(bundle, RTX, None, Options(capacity=64, compute_capabilities=("1.0",)))
    with pytest.raises(ppexport.RequestError, match="a timing cache is for tensorrt only"):
        compile_bundle(bundle, RTX, None, Options(capacity=64, timing_cache=tmp_path / "cache"))
    with pytest.raises(ppexport.BackendError, match=r"tensorrt cannot be imported .*nvidia-jetpack"):
        compile_bundle(bundle, "tensorrt")
    with pytest.raises(
        ppexport.BackendError, match="target is 'tpu', expected one of: tensorrt, tensorrt-rtx"
    ):
        compile_bundle(bundle, "tpu")


def test_set_axis_changes_that_axis_alone(bundle: Path) -> None:
    raw = (bundle / "language.onnx").read_bytes()
    found, expected = onnx.load_from_string(set_axis(raw, "M", 96)), onnx.load_from_string(raw)
    for value in [*expected.graph.input, *expected.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "M":
                dim.dim_value = 96
    assert found == expected
    with pytest.raises(ValueError, match="cut off"):
        set_axis(raw[: len(raw) // 2], "M", 96)
