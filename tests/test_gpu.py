"""On a real GPU: every device that is installed against the CPU, with the trained model of the repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ppexport
from ppexport.build_bundle import build
from ppexport.models.errors import PpexportError
from ppexport.models.pruners.pixelprune import PRUNE_GRAPHS
from ppexport.runtime.backends import cuda, trt_api
from ppexport.runtime.image import prepare
from ppexport.trt_build import Options
from ppexport.workloads.screens import HELD_OUT, SKILLS, sample

pytestmark = pytest.mark.gpu
POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"
KINDS = [("cuda", "cuda"), ("cuda", "plain"), ("tensorrt", "plain")]
KINDS += [("tensorrt-rtx", "standard"), ("tensorrt-rtx", "plain")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ppexport.Pipeline:
    device, dialect = request.param
    try:
        capability = cuda.compute_capability()
        targets = [] if device == "cuda" else [device]
        for target in targets:
            trt_api.load(target)
    except PpexportError as err:
        pytest.skip(f"no {device} here: {err}")
    path = tmp_path_factory.mktemp(device) / "bundle"
    build(POCKET, path, "fp16", dialect, targets, None, Options(capacity=1024))
    try:
        return ppexport.load(path, device)
    except PpexportError as err:
        pytest.skip(f"{device} does not run on compute capability {capability}: {err}")


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> ppexport.Pipeline:
    return ppexport.load(build(POCKET, tmp_path_factory.mktemp("cpu") / "bundle", "fp16"), "cpu")


@pytest.mark.parametrize("prune", [None, ppexport.PixelPrune()], ids=["unpruned", "pruned"])
def test_answers_equal_the_cpu(
    pipe: ppexport.Pipeline, cpu: ppexport.Pipeline, prune: ppexport.PixelPrune | None
) -> None:
    for skill in SKILLS:
        for seed in range(5):
            made = sample(skill, HELD_OUT + seed)
            found, expected = (
                p.generate(made.question, [np.asarray(made.image)], prune).text() for p in (pipe, cpu)
            )
            assert found == expected


@pytest.mark.parametrize(("method", "metric"), PRUNE_GRAPHS)
def test_selections_equal_the_cpu(pipe: ppexport.Pipeline, method: str, metric: str) -> None:
    """Exactly, as sums of whole numbers; engines have the usual graph only."""
    if not pipe.backend.name.startswith("onnxruntime-cuda") and (method, metric) != ("pred_2d", "max"):
        pytest.skip("engines prune with pred_2d and max only")
    for i, made in enumerate(sample(skill, HELD_OUT + 7) for skill in SKILLS):
        image = prepare(made.image, 32, 1, 1 << 20)
        for tau in (0.0,) if method == "unique" else (0.0, 0.02, 0.3):
            prune = ppexport.PixelPrune(method, metric, tau, seed=i if method == "conncomp" else 0)
            found = pipe.selector.select(pipe.backend.upload(image), prune)[1]
            np.testing.assert_array_equal(found.keep, ppexport.select(image, prune, min_pixels=1).keep)


def test_embeddings_equal_the_cpu(pipe: ppexport.Pipeline, cpu: ppexport.Pipeline) -> None:
    image = sample("read", HELD_OUT).image
    found, expected = (p.encode(image) for p in (pipe, cpu))
    np.testing.assert_array_equal(found.keep, expected.keep)
    assert np.abs(found.embeds - expected.embeds).max() < 2e-2 * np.abs(expected.embeds).max()


def test_memory_does_not_grow(pipe: ppexport.Pipeline) -> None:
    made = sample("read", HELD_OUT)
    for count in (3, 20):
        for _ in range(count):
            pipe.generate(made.question, [np.asarray(made.image)]).text()
        if count == 3:
            before = pipe.backend.memory.total  # type: ignore[attr-defined]
    assert pipe.backend.memory.total == before  # type: ignore[attr-defined]
