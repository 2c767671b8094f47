"""Fixtures: golden data, bundles built once per run, small random checkpoints."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest

import ppexport
from ppexport.runtime.backends import devices
from ppexport.runtime.backends.ort import OrtCpu
from ppexport.runtime.backends.processor import saturates

GOLDEN = Path(__file__).parent / "golden"
IMAGES = (
    Path(__file__).parent.parent / "ppexport" / "bench" / "images"
)  # real ones, which ship with the package
WITHOUT_VNNI = saturates()  # w8a8 does not run on such a CPU
E2E_PIXELS = 600000  # max_pixels of the e2e cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bundles", type=Path, help="Bundles that tests/bundles.py built, where there is no exporter."
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than there are cores: tests that wait for commands or for time leave them to others."""
    return (os.cpu_count() or 1) + 1


def usual_and_slow(usual: Sequence[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters: those of every run, and the others marked as slow."""
    others = [each for each in every if each not in usual]
    marked = [each if isinstance(each, tuple) else (each,) for each in others]
    return [*usual, *(pytest.param(*each, marks=pytest.mark.slow) for each in marked)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Bundles in w8a8 are refused by x86 CPUs without VNNI: what needs one to run is skipped there, and says so."""
    try:
        yield
    except (ppexport.BackendError, AssertionError) as err:
        if "found a CPU without VNNI" in str(err) and WITHOUT_VNNI:
            pytest.skip("w8a8 runs on CPUs with VNNI only")
        raise


@pytest.fixture(scope="session", autouse=True)
def traces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What was traced (traced.Traces), by any process of this run or command that it starts; None without exporter."""
    if request.config.getoption("--bundles"):
        yield None
        return
    import share_traces
    from traced import Traces

    from ppexport.exporters import graphs

    base = tmp_path_factory.getbasetemp()
    found = Traces((base.parent if hasattr(request.config, "workerinput") else base) / "traces")
    with pytest.MonkeyPatch.context() as patch:
        for name in Traces.SHARED:
            patch.setattr(graphs, name, found.once(getattr(graphs, name)))
        patch.setenv(share_traces.FOLDER, str(found.folder))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "shared_traces"), prepend=os.pathsep)
        yield found


@pytest.fixture(scope="session", autouse=True)
def one_core_each(request: pytest.FixtureRequest, traces: Any) -> Iterator[None]:
    """Tests that run side by side do not wait for each other's threads: one each where nobody asks for a number."""
    if not hasattr(request.config, "workerinput"):
        yield
        return
    if traces is not None:
        import torch

        torch.set_num_threads(1)
    start = OrtCpu.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrtCpu, "__init__", lambda backend, threads=0: start(backend, threads or 1))
        yield


@pytest.fixture(scope="session", autouse=True)
def without_openvino(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """ "auto" is ONNX Runtime alone but in tests of the choice; so it is in commands (without_openvino.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "has_openvino", lambda: False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def bundle_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A bundle by its name (bundles.NAMES), built when it is first asked for."""
    given = request.config.getoption("--bundles")

    @functools.cache
    def one(name: str) -> Path:
        if given:
            return Path(given).absolute() / name
        return bundles.build_one(name, tmp_path_factory.mktemp(name) / "bundle")

    return one


@pytest.fixture(scope="session")
def golden_bundle(bundle_of: Callable[[str], Path]) -> Path:
    """The golden checkpoint, built in float32 for ONNX Runtime."""
    return bundle_of("golden")


@pytest.fixture(scope="session")
def pocket_bundle(bundle_of: Callable[[str], Path]) -> Path:
    """The pocket model, as ``ppexport build`` makes it."""
    return bundle_of("pocket")


@pytest.fixture(scope="session")
def golden_pipe(golden_bundle: Path) -> ppexport.Pipeline:
    """It computes every request anew, so that tests do not depend on those before them."""
    return ppexport.load(golden_bundle, max_pixels=E2E_PIXELS, reuse=0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(bundle_of: Callable[[str], Path]) -> Path:
    """The tiny checkpoint, as ``ppexport build`` makes it."""
    return bundle_of("tiny")


@pytest.fixture(scope="session")
def tiny_pipe(tiny_bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(tiny_bundle, min_pixels=32 * 32, max_pixels=256 * 256)


@pytest.fixture
def screen() -> np.ndarray:
    """A 128 x 160 picture with flat areas and detail: 4 x 5 tokens."""
    picture = np.full((128, 160, 3), 240, np.uint8)
    picture[:32] = (30, 60, 90)
    picture[40:60, 20:100] = np.random.default_rng(0).integers(0, 255, (20, 80, 3), np.uint8)
    return picture


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of two tensors [..., D]: [...]."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
