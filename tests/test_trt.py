"""The TensorRT backend's logic, on the emulator: real pointers, profiles enforced, no GPU."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest
from conftest import E2E_PIXELS, GOLDEN, IMAGES
from terminal import runner

import ppexport
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.compile_bundle import compile_bundle
from ppexport.models import profiles
from ppexport.runtime.backends import cuda, trt, trt_api
from ppexport.runtime.backends import gpu as gpu_backend
from ppexport.runtime.bundle import open_bundle
from ppexport.runtime.stats import Stats
from ppexport.trt_build import Options
from ppexport.verify import verify_device

NAMES = {"one": ["web_gnuplot.png"], "two": ["web_gnuplot.png", "gui_mousepad.png"]}
PRUNE = [ppexport.PixelPrune(), ppexport.PruneSID(60)]  # so both are compiled
CASES = ["one_full", "one_tau0", "two_full", "two_tau0"]
REPOSITORY = Path(__file__).resolve().parent.parent
POCKET = REPOSITORY / "models" / "pocket"
SCREEN = REPOSITORY / "docs" / "settings.png"


KINDS = [("tensorrt", "standard"), ("tensorrt", "plain"), ("tensorrt-rtx", "standard")]


@pytest.fixture(
    scope="module", params=[*KINDS[1:], pytest.param(KINDS[0], marks=pytest.mark.slow)], ids="-".join
)
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Target and dialect."""
    return request.param


@pytest.fixture(scope="module")
def target(kind: tuple[str, str]) -> str:
    return kind[0]


@pytest.fixture(scope="module")
def gpu(target: str) -> Iterator[emulator.Cuda]:
    with emulator.installed(target) as cuda:
        yield cuda


@pytest.fixture(scope="module")
def bundle(kind: tuple[str, str], gpu: emulator.Cuda, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model in fp16, "compiled"."""
    path = tmp_path_factory.mktemp("-".join(kind)) / "bundle"
    options = Options(max_pixels=E2E_PIXELS, capacity=1536)
    checkpoint = GOLDEN / "e2e" / "model"
    build(checkpoint, path, "fp16", kind[1], targets=[kind[0]], options=options, prune=PRUNE)
    return path


@pytest.fixture(scope="module")
def pipe(bundle: Path, target: str) -> ppexport.Pipeline:
    return ppexport.load(bundle, target)


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> ppexport.Pipeline:
    path = build(GOLDEN / "e2e" / "model", tmp_path_factory.mktemp("cpu") / "bundle", "fp16")
    return ppexport.load(path, max_pixels=E2E_PIXELS)


def asked(pipe: ppexport.Pipeline, case: str, count: int, stats: Stats | None = None) -> Any:
    ids = np.load(GOLDEN / "e2e" / f"{case}.npz")["input_ids"]
    prune = None if case.endswith("full") else ppexport.PixelPrune()
    images = [IMAGES / name for name in NAMES[case[:3]]]
    return pipe.generate_tokens(ids, images, prune, max_new_tokens=count, stats=stats)


def tokens(pipe: ppexport.Pipeline, case: str, count: int = 12) -> list[int]:
    return [step.token for step in asked(pipe, case, count)]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_the_cpu(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline, case: str) -> None:
    assert tokens(pipe, case) == tokens(cpu, case)


def test_features_equal_the_cpu(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline) -> None:
    found, expected = (p.encode(IMAGES / "web_gnuplot.png", ppexport.PixelPrune()) for p in (pipe, cpu))
    np.testing.assert_array_equal(found.keep, expected.keep)
    np.testing.assert_allclose(found.embeds, expected.embeds, atol=2e-3 * np.abs(expected.embeds).max())


def test_buffers_that_are_not_aligned(pipe: ppexport.Pipeline) -> None:
    """Views that begin anywhere in a buffer give what aligned ones give."""
    array = np.arange(3 * 32 * 32 * 6, dtype=np.uint8).reshape(32, 192, 3)
    image = pipe.backend.upload(np.concatenate([np.zeros(1, np.uint8), array.reshape(-1)]))
    shifted = image.rows(1, 1 + array.size).reshape(*array.shape)
    keep, _ = pipe.selector.select(shifted, None)
    expected = pipe.backend.download(pipe.vision.encode(pipe.backend.upload(array), keep, {}).features)
    again = pipe.vision.encode(shifted, keep, {}).features
    np.testing.assert_array_equal(pipe.backend.download(again), expected)
    parts = [pipe.vision.encode(shifted, keep.rows(*rows), {}).features for rows in ((1, 4), (0, 6))]
    both = pipe.backend.download(pipe.vision.join(parts))
    np.testing.assert_array_equal(both[:, :3], pipe.backend.download(parts[0]))
    np.testing.assert_array_equal(both[:, 3:], expected)


def contexts(pipe: ppexport.Pipeline) -> list[emulator.IExecutionContext]:
    """Of the language engine: for the prompt, for single tokens."""
    return [context.context for context in pipe.language.session.all_contexts()]  # type: ignore[attr-defined]


def test_decode_replays_a_graph(pipe: ppexport.Pipeline, gpu: emulator.Cuda, target: str) -> None:
    """The first decode runs, the second is captured, the others are replayed (as long as shapes stay)."""
    before = gpu.launches
    tokens(pipe, "one_tau0", 12)
    strategies = [context.strategy.name for context in contexts(pipe)]
    if target == "tensorrt":
        assert gpu.launches - before >= 9
        assert strategies == ["DISABLED", "DISABLED"]
    else:  # the runtime captures by itself
        assert gpu.launches == before
        assert strategies == ["DISABLED", "WHOLE_GRAPH_CAPTURE"]


def test_prompt_and_tokens_run_on_their_own_profiles(pipe: ppexport.Pipeline) -> None:
    pipe.engine.forget()  # or only the prompt's last token would be run
    before = [context.runs for context in contexts(pipe)]
    assert len(tokens(pipe, "one_tau0", 5)) == 5
    assert [context.runs for context in contexts(pipe)] == [before[0] + 1, before[1] + 4]


def test_two_requests_in_turns_on_one_pipeline(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline) -> None:
    """A captured graph is not replayed for another sequence, nor after another one has run."""
    ids = [np.load(GOLDEN / "e2e" / "one_tau0.npz")["input_ids"], [5, 6, 7, 8]]
    images = [[IMAGES / "web_gnuplot.png"], []]
    expected = [
        [step.token for step in cpu.generate_tokens(i, p, PRUNE[:1], max_new_tokens=8)]
        for i, p in zip(ids, images, strict=True)
    ]
    one, two = (
        pipe.generate_tokens(i, p, PRUNE[:1], max_new_tokens=8) for i, p in zip(ids, images, strict=True)
    )
    found: list[list[int]] = [[], []]
    for turn in (0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1):
        found[turn].append(next((one, two)[turn]).token)
    assert found == expected


def test_two_threads_on_one_pipeline(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline) -> None:
    expected = {case: tokens(cpu, case) for case in ("one_full", "one_tau0")}
    with ThreadPoolExecutor(2) as pool:
        for case, found in zip(
            [*expected] * 2, pool.map(lambda c: tokens(pipe, c), [*expected] * 2), strict=True
        ):
            assert found == expected[case]


def test_loading_and_closing_leaves_nothing(bundle: Path, target: str, gpu: emulator.Cuda) -> None:
    def counts() -> tuple[int, int, int, int]:
        gc.collect()
        return len(gpu.allocated), len(gpu.pinned), len(gpu.streams), len(gpu.graphs)

    before = counts()
    for _ in range(2):
        with ppexport.load(bundle, target) as pipe:
            list(pipe.generate_tokens([5, 6, 7], max_new_tokens=6))
        del pipe
        assert counts() == before
    pipe = ppexport.load(bundle, target)
    list(pipe.generate_tokens([5, 6, 7], max_new_tokens=6))
    del pipe  # nobody closed it
    assert counts() == before


def test_no_memory_leaks(pipe: ppexport.Pipeline, gpu: emulator.Cuda) -> None:
    image = np.full((64, 96, 3), 200, np.uint8)
    ids = [3, *[500] * 70, 4]

    def request() -> None:
        list(pipe.generate_tokens(ids, [image], max_new_tokens=3))

    for _ in range(3):
        request()
    gc.collect()
    device, pinned = len(gpu.allocated), len(gpu.pinned)
    for _ in range(200):
        request()
    gc.collect()
    assert (len(gpu.allocated), len(gpu.pinned)) == (device, pinned)


def test_sizes_outside_every_profile(
    bundle: Path, target: str, pipe: ppexport.Pipeline, tmp_path: Path
) -> None:
    wide = np.zeros((32, 4000, 3), np.uint8)
    message = r"the prune engine: W \(width in pixels\) is 4000, the engine takes 32 to \d+; build it again with --max"
    with pytest.raises(ppexport.RequestError, match=message):
        ppexport.load(bundle, target, min_pixels=1024).encode(wide)
    with pytest.raises(
        ppexport.RequestError, match=r"the prompt takes 1600 tokens, expected under 1536 \(the engines'"
    ):
        list(pipe.generate_tokens([5] * 1600))
    small = shutil.copytree(bundle, tmp_path / "small")
    _, manifest = open_bundle(small)
    sizes = profiles.defaults(manifest.model, manifest.context, E2E_PIXELS, 1536)
    sizes.prefill[0]["S"] = (1, 8, 16)
    compile_bundle(small, target, sizes)
    with pytest.raises(
        ppexport.RequestError, match=r"the language engine: S \(tokens of the prompt\) is 17, the engine"
    ):
        list(ppexport.load(small, target).generate_tokens([5] * 17))


def test_generation_ends_where_the_cache_does(bundle: Path, target: str, tmp_path: Path) -> None:
    small = shutil.copytree(bundle, tmp_path / "small")
    compile_bundle(small, target, None, Options(max_pixels=65536, capacity=24))
    pipe, stats = ppexport.load(small, target), ppexport.Stats()
    steps = list(pipe.generate_tokens([5] * 20, max_new_tokens=50, stats=stats))
    assert (len(steps), stats.finish) == (4, "context")
    with pytest.raises(ppexport.RequestError, match="25 tokens, expected at most 24"):
        pipe.engine.placement.make_room(pipe.language.slots(24), 25)


def test_two_pipelines_on_two_threads(bundle: Path, target: str, cpu: ppexport.Pipeline) -> None:
    pipes = [ppexport.load(bundle, target) for _ in range(2)]
    expected = {case: tokens(cpu, case) for case in ("one_full", "one_tau0")}
    found: list[tuple[str, list[int]]] = []

    def work(pipe: ppexport.Pipeline, case: str) -> None:
        for _ in range(2):
            found.append((case, tokens(pipe, case)))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(pipes, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(result == expected[case] for case, result in found)


def test_an_unbound_input_is_an_error(pipe: ppexport.Pipeline) -> None:
    with pytest.raises(ppexport.BackendError, match="the input image of the prune engine is not bound"):
        pipe.selector.session("pixelprune.pred_2d.max").binding().run()


def test_engines_prune_with_one_method(pipe: ppexport.Pipeline) -> None:
    message = (
        r"pixelprune.raster.max.onnx is not compiled for .*: engines prune with pixelprune.pred_2d.max.onnx and "
        "prunesid.qwen.onnx and prunesid.information.onnx only, which the bundle's own pruning names"
    )
    with pytest.raises(ppexport.RequestError, match=message):
        pipe.encode(IMAGES / "web_gnuplot.png", ppexport.PixelPrune("raster"))


@pytest.mark.parametrize("budget", [9, 60, 200])
def test_pruning_of_features_equals_the_cpu(pipe: ppexport.Pipeline, budget: int) -> None:
    """Whatever the budget, an engine keeps of its own features what the graph for CPUs keeps of them."""
    image = IMAGES / "web_gnuplot.png"
    seen = pipe.encode(image, ppexport.PixelPrune())
    prune = ppexport.PruneSID(budget)
    expected = ppexport.select_tokens(np.float32(seen.embeds), prune).keep
    found = pipe.encode(image, [ppexport.PixelPrune(), prune])
    np.testing.assert_array_equal(found.keep, seen.keep[expected])
    np.testing.assert_array_equal(found.features, seen.features[:, expected])
    if budget == 60:  # as the bundle has it
        np.testing.assert_array_equal(pipe.encode(image).keep, found.keep)


def test_information_equals_the_cpu(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline) -> None:
    found, expected = (p.information(IMAGES / "web_gnuplot.png") for p in (pipe, cpu))
    assert found == pytest.approx(expected, abs=1e-3)


def test_graphs_that_prune_features_stay_exact(
    bundle: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 is off for them, and only for them."""
    cleared: list[emulator.BuilderFlag] = []
    compiled: list[int] = []
    monkeypatch.setattr(emulator.IBuilderConfig, "clear_flag", lambda config, flag: cleared.append(flag))
    whole = emulator.Builder.build_serialized_network

    def build_serialized_network(builder: emulator.Builder, network: Any, config: Any) -> memoryview:
        compiled.append(len(cleared))
        return whole(builder, network, config)

    monkeypatch.setattr(emulator.Builder, "build_serialized_network", build_serialized_network)
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    record = compile_bundle(copy, target, None, Options(max_pixels=E2E_PIXELS, capacity=1536))
    names = ["prune", "vision", "language", "prunesid.qwen", "prunesid.information"]
    assert list(record.engines) == names
    assert compiled == [0, 0, 0, 1, 2]
    assert set(cleared) == {emulator.BuilderFlag.TF32}
    assert record.engines["prunesid.qwen"].profiles == (
        {"K": record.profiles.vision[0]["K"], "p": (1, 72, 72)},
    )


def test_anchored_selection_equals_the_cpu(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline) -> None:
    image, prune = IMAGES / "pdf_gnuplot-020.png", ppexport.PixelPrune(tau=0.1)
    found, expected = (p.encode(image, prune).keep for p in (pipe, cpu))
    np.testing.assert_array_equal(found, expected)


def test_engines_of_another_version_or_gpu_are_refused(
    bundle: Path, target: str, gpu: emulator.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = len(gpu.streams)
    trt = trt_api.load(target)
    monkeypatch.setattr(trt, "__version__", "10.3.0")
    message = rf"compiled by {target} [\d.]+, found 10.3.0 here; run: ppexport build .* --target {target}"
    with pytest.raises(ppexport.BundleError, match=message):
        ppexport.load(bundle, target)
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "capability", (7, 5))
    with pytest.raises(
        ppexport.BundleError, match=r"for compute capability 8.*, found 7.5 here; run: ppexport build"
    ):
        ppexport.load(bundle, target)
    assert len(gpu.streams) == streams


def test_engines_for_later_versions_and_other_gpus(
    bundle: Path, target: str, gpu: emulator.Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil.copytree(bundle, tmp_path / "small")
    options = Options(max_pixels=65536, capacity=24, version_compatible=True, hardware_compatible=True)
    if target == "tensorrt-rtx":
        with pytest.raises(ppexport.RequestError, match="version-compatible engines are for tensorrt only"):
            compile_bundle(small, target, None, options)
        return
    compile_bundle(small, target, None, options)
    trt = trt_api.load(target)
    monkeypatch.setattr(trt, "__version__", "10.16.1")
    monkeypatch.setattr(gpu, "capability", (12, 0))
    pipe = ppexport.load(small, target)
    assert pipe.backend.runtime.engine_host_code_allowed  # type: ignore[attr-defined]
    monkeypatch.setattr(trt, "__version__", "10.3.0")
    with pytest.raises(ppexport.BundleError, match="found 10.3.0 here"):
        ppexport.load(small, target)


def test_engines_that_were_changed(bundle: Path, target: str, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    file = copy / "engines" / target / "vision.engine"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ppexport.BundleError, match="is not the engine that was compiled"):
        ppexport.load(copy, target, verify=True)
    result = runner().invoke(main, ["doctor", str(copy)])
    assert re.search(rf"on {target} +does not run: .*is not the engine that was compiled", result.output)


def test_doctor_sees_the_gpu(bundle: Path, target: str) -> None:
    result = runner().invoke(main, ["doctor", str(bundle)])
    assert result.exit_code == 0, result.output
    assert "Emulated, 8.6 GB, compute capability 8." in result.output
    assert "its driver takes CUDA up to 12.6" in result.output
    assert re.search(rf"can run on .*{target}", result.output)
    assert re.search(rf"on {target} +runs", result.output)


def test_auto_says_what_it_chose_and_why(
    bundle: Path, target: str, tiny_bundle: Path, gpu: emulator.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rf"{target} [\d.]+: the bundle has engines for it that run here"
    assert re.fullmatch(expected, ppexport.load(bundle, "auto").chosen)
    assert ppexport.load(tiny_bundle).chosen == "onnxruntime-cpu: the bundle has no engines"
    assert ppexport.load(tiny_bundle, "cpu").chosen == "onnxruntime-cpu, as asked for"
    monkeypatch.setattr(gpu, "capability", (7, 5))
    if "plain" in str(bundle):
        assert ppexport.load(bundle).chosen.startswith("onnxruntime-cpu: ")
        assert "found 7.5 here; run: ppexport build" in ppexport.load(bundle).chosen
    else:
        with pytest.raises(ppexport.BackendError, match=r"on no device here: .*found 7.5.*dialect standard"):
            ppexport.load(bundle)
    with pytest.raises(
        ppexport.BackendError, match="device is 'tpu', expected one of: auto, cpu, cuda, openvino, tensorrt"
    ):
        ppexport.load(bundle, "tpu")


def test_the_timing_cache_is_kept(bundle: Path, target: str, tmp_path: Path) -> None:
    if target == "tensorrt-rtx":
        pytest.skip("has no timing cache")
    copy, cache = shutil.copytree(bundle, tmp_path / "copy"), tmp_path / "cache"
    compile_bundle(copy, target, None, Options(capacity=64, max_pixels=65536, timing_cache=cache))
    assert cache.read_bytes() == b"timed" * 5
    cache.write_bytes(b"of another GPU")
    with pytest.raises(ppexport.RequestError, match="cache: is no timing cache of this TensorRT on this GPU"):
        compile_bundle(copy, target, None, Options(capacity=64, max_pixels=65536, timing_cache=cache))
    assert cache.read_bytes() == b"of another GPU"
    with pytest.raises(
        ppexport.RequestError, match="expected a file in an existing directory as timing cache"
    ):
        compile_bundle(copy, target, None, Options(timing_cache=tmp_path))
    assert ppexport.load(copy, target).chosen


def test_without_a_gpu_tensorrt_compiles_nothing(
    bundle: Path, target: str, gpu: emulator.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target == "tensorrt-rtx":
        pytest.skip("needs no GPU")
    none = types.SimpleNamespace(name="cudaErrorNoDevice", __int__=lambda: 100)
    failed = type("Error", (int,), {"name": none.name})(100)
    monkeypatch.setattr(gpu, "cudaDeviceGetAttribute", lambda *_: (failed, None), raising=False)
    with pytest.raises(
        ppexport.BackendError, match=r"compiles on the GPU that it compiles for, found none: CUDA failed"
    ):
        compile_bundle(bundle, target)


def test_the_emulator_notices_mistakes(pipe: ppexport.Pipeline, gpu: emulator.Cuda) -> None:
    """An output without an address, a cache that is not aliased, a replay after a change, a copy out of bounds."""
    engine = pipe.language.session.loaded  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="the address of logits is not set"):
        engine.run({name: 0 for name in engine.types if name != "logits"}, {})
    caches = {name: i for i, name in enumerate(engine.types)}
    if engine.caches:
        with pytest.raises(AssertionError, match="is not aliased with its input"):
            engine.run(caches, {})
    with pytest.raises(AssertionError, match="a copy outside of all allocated memory"):
        gpu.cudaMemcpyAsync(1234, 5678, 4, None, pipe.backend.stream)  # type: ignore[attr-defined]


def test_memory_is_kept_and_given_back(gpu: emulator.Cuda) -> None:
    memory = cuda.Memory(gpu)  # type: ignore[arg-type]
    before = len(gpu.allocated)
    first = memory.take(1000)
    pointer = first.pointer
    assert (first.size, pointer % 256) == (1024, 0)
    del first
    assert memory.take(600).pointer == pointer
    assert memory.take((100 << 20) + 1).size == 101 << 20
    assert memory.total == 1024 + (101 << 20)
    last = memory.take(5000)
    memory.close()
    assert (memory.total, len(gpu.allocated)) == (8192, before + 1)
    del last  # what was still in use is freed when it is not any more
    assert (memory.total, len(gpu.allocated)) == (0, before)


def test_a_second_question_runs_what_is_new(
    pipe: ppexport.Pipeline, cpu: ppexport.Pipeline, gpu: emulator.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the cache of the first one."""
    ids = np.load(GOLDEN / "e2e" / "one_tau0.npz")["input_ids"]
    picture, other = [IMAGES / NAMES["one"][0]], np.append(ids, [7, 9])
    expected = [s.token for s in cpu.generate_tokens(other, picture, ppexport.PixelPrune(), max_new_tokens=6)]
    list(pipe.generate_tokens(ids, picture, ppexport.PixelPrune(), max_new_tokens=2))
    monkeypatch.setattr(pipe.vision, "encode", None)  # its features are kept
    gc.collect()
    allocated, stats = len(gpu.allocated), ppexport.Stats()
    steps = pipe.generate_tokens(other, picture, ppexport.PixelPrune(), max_new_tokens=6, stats=stats)
    assert [s.token for s in steps] == expected
    assert stats.reused_tokens >= stats.kept > 0
    assert len(gpu.allocated) <= allocated + 4  # no further cache


def test_engines_whose_profiles_begin_higher_run_whole_prompts(
    bundle: Path, target: str, tmp_path: Path
) -> None:
    small = shutil.copytree(bundle, tmp_path / "small")
    _, manifest = open_bundle(small)
    sizes = profiles.defaults(manifest.model, manifest.context, E2E_PIXELS, 1536)
    sizes.prefill[0]["S"] = (4, 8, 64)
    compile_bundle(small, target, sizes)
    pipe, stats = ppexport.load(small, target), ppexport.Stats()
    assert not pipe.backend.appends
    first = list(pipe.generate_tokens([5] * 10, max_new_tokens=3))
    again = list(pipe.generate_tokens([5] * 10, max_new_tokens=3, stats=stats))
    assert ([s.token for s in first], stats.reused_tokens) == ([s.token for s in again], 0)


@pytest.mark.parametrize("call", ["run", "end", "instantiate"])
def test_a_capture_that_fails_is_left_out(
    bundle: Path, target: str, gpu: emulator.Cuda, cpu: ppexport.Pipeline, call: str
) -> None:
    """Tokens are as ever; it is tried once, and said once."""
    if target == "tensorrt-rtx":
        pytest.skip("its runtime captures by itself")
    gpu.refuse_captures = call
    launches = gpu.launches
    try:
        with ppexport.load(bundle, target) as pipe:
            stats = [Stats(), Stats()]
            found = [
                [step.token for step in asked(pipe, case, 12, each)]
                for case, each in zip(("one_full", "one_tau0"), stats, strict=True)
            ]
    finally:
        gpu.refuse_captures = ""
    assert found == [tokens(cpu, "one_full"), tokens(cpu, "one_tau0")]
    assert gpu.launches == launches
    assert [len(each.notes) for each in stats] == [1, 0]
    assert "the language engine runs without a CUDA graph" in stats[0].notes[0]


def test_int8_in_groups_is_refused(
    bundle: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bundles of earlier releases have it."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    file = copy / "bundle.json"
    text = json.loads(file.read_text())
    text["precision"] |= {"language": "int8", "per_output": False}
    file.write_text(json.dumps(text))
    with pytest.raises(
        ppexport.BundleError, match="int8 with a scale per group, expected one per output: TensorRT"
    ):
        compile_bundle(copy, target)


def test_a_disk_that_is_full(bundle: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an engine is written, in pieces: the bundle has what it had."""
    before = {file.name: file.stat().st_mtime_ns for file in (bundle / "engines" / target).iterdir()}
    whole = Path.open

    def full(path: Path, *given: Any, **named: Any) -> Any:
        return whole(Path("/dev/full") if path.suffix == ".engine" else path, *given, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ppexport.SpaceError, match=r"No space left on device; the bundle is as it was"):
        compile_bundle(bundle, target, None, Options(max_pixels=E2E_PIXELS, capacity=1536))
    monkeypatch.undo()
    assert {f.name: f.stat().st_mtime_ns for f in (bundle / "engines" / target).iterdir()} == before
    assert [folder.name for folder in (bundle / "engines").iterdir()] == [target]


def test_kernels_are_kept_for_the_next_process(
    bundle: Path, target: str, gpu: emulator.Cuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of RTX: they are compiled once for a GPU and driver; files that are torn, or cannot be there, do no harm."""
    if target == "tensorrt":
        pytest.skip("compiles kernels when it builds")
    copy = shutil.copytree(bundle, tmp_path / "copy")
    folder = copy / "engines" / target
    for kept in folder.glob("*.cache"):
        kept.unlink()
    compiled = emulator.IRuntimeConfig.compiled

    def loaded() -> int:
        before = len(compiled)
        with ppexport.load(copy, target) as pipe:
            assert tokens(pipe, "one_tau0", 3)
        return len(compiled) - before

    assert loaded() > 3
    assert loaded() == 0
    (file,) = folder.glob("*.cache")
    assert file.name == "kernels-Emulated-12060.cache"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert loaded() > 3
    assert "is not of this GPU, driver and TensorRT-RTX; it is made anew" in caplog.text
    assert (file.read_bytes(), loaded()) == (whole, 0)
    file.unlink()
    file.mkdir()
    assert loaded() > 3
    assert "kernels cannot be kept" in caplog.text
    assert ppexport.load(copy, target, verify=True).chosen


def test_memory_that_runs_out(bundle: Path, target: str, gpu: emulator.Cuda) -> None:
    """What is kept for later goes back first; then the error says what was asked for and what to lower."""
    with ppexport.load(bundle, target) as pipe:
        memory = pipe.backend.memory  # type: ignore[attr-defined]
        whole = gpu.limit
        try:
            kept = memory.take(100 << 20)
            del kept  # to the free list
            gpu.limit = gpu._taken() + (50 << 20)
            assert memory.take(120 << 20).size == 120 << 20
            with pytest.raises(
                ppexport.BackendError, match=r"asked for 1074 MB of memory of the GPU, found .* lower"
            ):
                memory.take(1 << 30)
        finally:
            gpu.limit = whole


def test_scratch_memory_is_there_once(
    bundle: Path, target: str, gpu: emulator.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the engines that are loaded later: what was outgrown is given back."""
    sizes = iter([3 << 20, 100 << 20, 200 << 20, *[1 << 20] * 20])
    made = emulator.ICudaEngine.__init__

    def larger(engine: emulator.ICudaEngine, *given: Any) -> None:
        made(engine, *given)
        engine.scratch[-1] = next(sizes)

    monkeypatch.setattr(emulator.ICudaEngine, "__init__", larger)
    with ppexport.load(bundle, target) as pipe:
        backend = pipe.backend
        assert isinstance(backend, trt.TrtBackend)
        backend.session(bundle / "vision.onnx").loaded.scratch[0] = 300 << 20
        backend.settle()
        large = sorted(len(memory) - 512 for memory in gpu.allocated.values() if len(memory) > 64 << 20)
        assert large == [300 << 20]


@pytest.mark.parametrize(
    "mistake", ["a read that waits for nothing", "staging memory that is used again too early"]
)
def test_the_emulator_is_behind(
    bundle: Path, target: str, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """What a GPU would get wrong only now and then is wrong here, every time."""
    x = np.arange(1000, dtype=np.float32)
    with ppexport.load(bundle, target) as pipe:
        backend = pipe.backend
        np.testing.assert_array_equal(backend.download(backend.upload(x)), x)
        with monkeypatch.context() as patch:
            if "read" in mistake:
                patch.setattr(gpu_backend.GpuBackend, "wait", lambda *_: None)
            else:
                patch.setattr(backend, "_in_flight", types.SimpleNamespace(append=id, clear=int))
            found = backend.download(backend.upload(x))
        assert np.isnan(found).all()


def test_an_engine_is_not_read_into_memory(
    bundle: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT makes its own copy; a second one of the host would not fit beside it on a Jetson."""
    seen: dict[str, int] = {}
    size = 1 << 30

    def anonymous() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) << 10

    def deserialize(_: Any, blob: Any) -> None:
        seen["bytes"] = memoryview(blob).nbytes
        seen["grown"] = anonymous() - before

    with ppexport.load(bundle, target) as pipe:
        file = tmp_path / "large.engine"
        with file.open("wb") as made:
            made.truncate(size)
        monkeypatch.setattr(emulator.Runtime, "deserialize_cuda_engine", deserialize)
        monkeypatch.setattr(trt.engine_record, "folder", lambda *_: tmp_path)
        engine = dataclasses.replace(pipe.backend.record.engines["vision"], file=file.name)  # type: ignore[attr-defined]
        before = anonymous()
        with pytest.raises(ppexport.BackendError, match="cannot load the vision engine"):
            trt.TrtSession(pipe.backend, "vision", engine, bundle)  # type: ignore[arg-type]
    assert seen["bytes"] == size
    assert seen["grown"] < 0.1 * size


def test_verify_against_the_cpu(
    target: str, bundle: Path, gpu: emulator.Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage by stage over the same tokens, without torch; engines that compute something else are caught."""
    if "standard" in str(bundle):
        with pytest.raises(
            ppexport.BundleError, match="has fp16 graphs of dialect standard, expected plain or cuda in fp16"
        ):
            verify_device(bundle, target, [])
        return
    image = str(IMAGES / NAMES["one"][0])
    report = verify_device(bundle, target, [image], prune=ppexport.PixelPrune(), tokens=8)
    assert not report.problems(0.999, 0.01, 0.99)
    assert (report.tokens, report.agreement) == (8, 1.0)
    pocket = build(POCKET, tmp_path / "pocket", "fp16", "plain", [target], options=Options(capacity=512))
    command = [
        "verify",
        str(pocket),
        "--against-cpu",
        "--device",
        target,
        "-i",
        str(SCREEN),
        "-n",
        "6",
        "--json",
    ]
    result = runner().invoke(main, command)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["tokens"], row["problems"]) == (6, [])
    whole = emulator.write

    def wrong(pointer: int, value: np.ndarray, dtype: Any) -> None:
        whole(pointer, value[::-1] if value.ndim == 3 and value.shape[0] == 3 else value, dtype)

    monkeypatch.setattr(emulator, "write", wrong)
    result = runner().invoke(main, command)
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)
    assert any(problem.startswith("embeds: cosine") for problem in row["problems"])
    for given in (["--against-cpu"], [], ["--against-cpu", "--device", "cpu"]):
        assert runner().invoke(main, ["verify", str(pocket), *given]).exit_code == 2
