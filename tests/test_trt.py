"""The TensorRT backend's logic, on the emulator: real pointers, profiles enforced, no GPU."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import emulator
import numpy as np
import pytest
from conftest import E2E_PIXELS, GOLDEN, IMAGES

import ppexport
from ppexport.build import build
from ppexport.compiler import Options
from ppexport.engines import compile_bundle
from ppexport.models import profiles
from ppexport.runtime import cuda
from ppexport.runtime.bundle import open_bundle

NAMES = {"one": ["web_gnuplot.png"], "two": ["web_gnuplot.png", "gui_mousepad.png"]}
CASES = ["one_full", "one_tau0", "two_full", "two_tau0"]


@pytest.fixture(scope="module")
def gpu() -> Iterator[emulator.Cuda]:
    with emulator.installed() as cuda:
        yield cuda


@pytest.fixture(scope="module", params=["standard", "plain"])
def bundle(request: pytest.FixtureRequest, gpu: emulator.Cuda, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model in fp16, "compiled"."""
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    options = Options(max_pixels=E2E_PIXELS, capacity=1536)
    build(GOLDEN / "e2e" / "model", path, "fp16", request.param, targets=["tensorrt"], options=options)
    return path


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(bundle, "tensorrt")


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> ppexport.Pipeline:
    path = build(GOLDEN / "e2e" / "model", tmp_path_factory.mktemp("cpu") / "bundle", "fp16")
    return ppexport.load(path, max_pixels=E2E_PIXELS)


def tokens(pipe: ppexport.Pipeline, case: str, count: int = 12) -> list[int]:
    ids = np.load(GOLDEN / "e2e" / f"{case}.npz")["input_ids"]
    prune = None if case.endswith("full") else ppexport.Prune()
    images = [IMAGES / name for name in NAMES[case[:3]]]
    return [step.token for step in pipe.generate_tokens(ids, images, prune, max_new_tokens=count)]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_the_cpu(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline, case: str) -> None:
    assert tokens(pipe, case) == tokens(cpu, case)


def test_features_equal_the_cpu(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline) -> None:
    found, expected = (p.encode(IMAGES / "web_gnuplot.png", ppexport.Prune()) for p in (pipe, cpu))
    np.testing.assert_array_equal(found.keep, expected.keep)
    np.testing.assert_allclose(found.embeds, expected.embeds, atol=2e-3 * np.abs(expected.embeds).max())


def test_buffers_that_are_not_aligned(pipe: ppexport.Pipeline) -> None:
    """Views that begin anywhere in a buffer give what aligned ones give."""
    array = np.arange(3 * 32 * 32 * 6, dtype=np.uint8).reshape(32, 192, 3)
    image = pipe.backend.upload(np.concatenate([np.zeros(1, np.uint8), array.reshape(-1)]))
    shifted = image.rows(1, 1 + array.size).reshape(*array.shape)
    keep, _ = pipe.selector.select(shifted, None)
    expected = pipe.backend.download(pipe.vision.encode([(pipe.backend.upload(array), keep)]))
    np.testing.assert_array_equal(pipe.backend.download(pipe.vision.encode([(shifted, keep)])), expected)
    both = pipe.vision.encode([(shifted, keep.rows(1, 4)), (shifted, keep.rows(0, 6))])
    assert np.isfinite(pipe.backend.download(both)).all()


def test_decode_replays_a_graph(pipe: ppexport.Pipeline, gpu: emulator.Cuda) -> None:
    """The first decode runs, the second is captured, the others are replayed (as long as shapes stay)."""
    before = gpu.launches
    tokens(pipe, "one_tau0", 12)
    assert gpu.launches - before >= 9


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


def test_sizes_outside_every_profile(bundle: Path, pipe: ppexport.Pipeline, tmp_path: Path) -> None:
    wide = np.zeros((32, 4000, 3), np.uint8)
    message = r"the prune engine: W \(width in pixels\) is 4000, the engine takes 32 to \d+; build it again with --max"
    with pytest.raises(ppexport.RequestError, match=message):
        ppexport.load(bundle, "tensorrt", min_pixels=1024).encode(wide)
    with pytest.raises(
        ppexport.RequestError, match=r"the prompt takes 1600 tokens, expected under 1536 \(the engines'"
    ):
        list(pipe.generate_tokens([5] * 1600))
    small = shutil.copytree(bundle, tmp_path / "small")
    _, manifest = open_bundle(small)
    sizes = profiles.defaults(manifest.model, manifest.context, E2E_PIXELS, 1536)
    sizes.prefill[0]["S"] = (1, 8, 16)
    compile_bundle(small, "tensorrt", sizes)
    with pytest.raises(
        ppexport.RequestError, match=r"the language engine: S \(tokens of the prompt\) is 17, the engine"
    ):
        list(ppexport.load(small, "tensorrt").generate_tokens([5] * 17))


def test_generation_ends_where_the_cache_does(bundle: Path, tmp_path: Path) -> None:
    small = shutil.copytree(bundle, tmp_path / "small")
    compile_bundle(small, "tensorrt", None, Options(max_pixels=64 * 64, capacity=24))
    pipe, stats = ppexport.load(small, "tensorrt"), ppexport.Stats()
    steps = list(pipe.generate_tokens([5] * 20, max_new_tokens=50, stats=stats))
    assert (len(steps), stats.finish) == (4, "context")
    decoding = pipe.language.start(24, pipe.language.no_features)
    decoding.length = 24
    with pytest.raises(ppexport.RequestError, match="25 tokens, expected at most 24"):
        decoding.decode(5, 24)


def test_two_pipelines_on_two_threads(bundle: Path, cpu: ppexport.Pipeline) -> None:
    pipes = [ppexport.load(bundle, "tensorrt") for _ in range(2)]
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
        pipe.selector.session("pred_2d", "max").binding().run()


def test_engines_prune_with_one_method(pipe: ppexport.Pipeline) -> None:
    message = r"prune.raster.max.onnx is not compiled for tensorrt: engines prune with prune.pred_2d.max.onnx only"
    with pytest.raises(ppexport.RequestError, match=message):
        pipe.encode(IMAGES / "web_gnuplot.png", ppexport.Prune("raster"))


def test_anchored_selection_equals_the_cpu(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline) -> None:
    image, prune = IMAGES / "pdf_gnuplot-020.png", ppexport.Prune(tau=0.1)
    found, expected = (p.encode(image, prune).keep for p in (pipe, cpu))
    np.testing.assert_array_equal(found, expected)


def test_engines_of_another_version_or_gpu_are_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt

    monkeypatch.setattr(tensorrt, "__version__", "10.3.0")
    message = r"compiled by tensorrt 10.15.0, found 10.3.0 here; run: ppexport build .* --target tensorrt"
    with pytest.raises(ppexport.BundleError, match=message):
        ppexport.load(bundle, "tensorrt")
    monkeypatch.undo()
    monkeypatch.setattr(emulator, "CAPABILITY", (12, 0))
    with pytest.raises(ppexport.BundleError, match=r"for compute capability 8.7, found 12.0 here; run: ppexport build"):
        ppexport.load(bundle, "tensorrt")


def test_auto_says_what_it_chose_and_why(bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ppexport.load(bundle, "auto").chosen == "tensorrt 10.15.0: the bundle has engines for it that run here"
    assert ppexport.load(tiny_bundle).chosen == "onnxruntime-cpu: the bundle has no engines"
    assert ppexport.load(tiny_bundle, "cpu").chosen == "onnxruntime-cpu, as asked for"
    monkeypatch.setattr(emulator, "CAPABILITY", (12, 0))
    if "plain" in str(bundle):
        assert ppexport.load(bundle).chosen.startswith("onnxruntime-cpu: ")
        assert "found 12.0 here; run: ppexport build" in ppexport.load(bundle).chosen
    else:
        with pytest.raises(ppexport.BackendError, match=r"on no device here: .*found 12.0.*dialect standard"):
            ppexport.load(bundle)
    with pytest.raises(ppexport.BackendError, match="device is 'tpu', expected one of: auto, cpu, cuda, tensorrt"):
        ppexport.load(bundle, "tpu")


def test_the_timing_cache_is_kept(bundle: Path, tmp_path: Path) -> None:
    copy, cache = shutil.copytree(bundle, tmp_path / "copy"), tmp_path / "cache"
    compile_bundle(copy, "tensorrt", None, Options(capacity=64, max_pixels=4096, timing_cache=cache))
    assert cache.read_bytes() == b"timed" * 3


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
    memory.close()
    assert (memory.total, len(gpu.allocated)) == (0, before)
