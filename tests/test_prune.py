"""The pruning predictor: against the golden selections, against the specification, and its graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import GOLDEN, IMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_order, check_selection
from pred_2d_spec import pred_2d

import ppexport
from ppexport.exporters.dialects import DIALECTS
from ppexport.exporters.prune import prune_graph
from ppexport.exporters.selectors import DIRECTORY, selector_bytes
from ppexport.models.config import SELECTOR_BLOCKS

SHARED_PHOTO = GOLDEN.parent.parent.parent / "shared" / "golden" / "images" / "doc_photo.jpg"
INDEX = json.loads((GOLDEN / "selection" / "index.json").read_text())


def source(name: str) -> Path:
    """The image; the one photo is not part of the repository."""
    path = IMAGES / name if (IMAGES / name).exists() else SHARED_PHOTO
    if not path.exists():
        pytest.skip(f"{name} is not part of the repository")
    return path


def golden_cases() -> list[tuple[str, str]]:
    """(image, case) for tau = 0 in both modes and every tau in sliding mode, metric max."""
    return [
        (name, case)
        for name, info in INDEX.items()
        for case in info["kept"]
        if case.startswith("pred_2d|max|") and ("|0.0|" in case or case.endswith("|sliding"))
    ]


@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_selection_equals_the_reference(name: str, case: str) -> None:
    expected = np.load(GOLDEN / "selection" / f"{name}.npz")
    _, _, tau, mode = case.split("|")
    prune = ppexport.Prune(tau=float(tau), anchored=mode == "anchored")
    selection = ppexport.select(source(name), prune)
    check_selection(selection)
    _, h, w = expected["grid_thw"]
    assert (selection.rows, selection.cols) == (h // 2, w // 2)
    assert (selection.height, selection.width) == (h * 16, w * 16)
    np.testing.assert_array_equal(selection.keep, expected[case])
    assert selection.kept == INDEX[name]["kept"][case]


@pytest.fixture(scope="module", params=["ort", "standard"])
def session(request: pytest.FixtureRequest) -> ort.InferenceSession:
    model = ir.to_proto(prune_graph(28, DIALECTS[request.param]))
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@st.composite
def images(draw: st.DrawFn) -> np.ndarray:
    """Grids from 1 x 1 to 7 x 7 made of few distinct tokens, some with a small disturbance of one byte."""
    rows, cols = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    palette = rng.integers(0, 256, (draw(st.integers(1, 4)), 28, 28, 3), np.uint8)
    tokens = palette[rng.integers(0, len(palette), (rows, cols))]
    step = draw(st.integers(0, 40))
    for r, c in np.ndindex(rows, cols):
        y, x, channel = rng.integers(28), rng.integers(28), rng.integers(3)
        value = int(tokens[r, c, y, x, channel]) + int(rng.integers(-step, step + 1))
        tokens[r, c, y, x, channel] = np.clip(value, 0, 255)
    return np.ascontiguousarray(tokens.transpose(0, 2, 1, 3, 4).reshape(rows * 28, cols * 28, 3))


@settings(max_examples=150, deadline=None)
@given(image=images(), threshold=st.sampled_from([0, 1, 5, 20, 254, 255]))
def test_graph_equals_the_specification(session: ort.InferenceSession, image: np.ndarray, threshold: int) -> None:
    order, count = session.run(None, {"image": image, "threshold": np.array([threshold], np.int32)})
    check_order(order, count, (image.shape[0] // 28) * (image.shape[1] // 28))
    assert order[: count[0]].tolist() == pred_2d(image, 28, threshold)


def test_graph_uses_standard_operators_and_no_nonzero() -> None:
    for dialect in DIALECTS.values():
        nodes = list(prune_graph(32, dialect).graph)
        assert {node.domain for node in nodes} == {""}
        assert "NonZero" not in {node.op_type for node in nodes}


@pytest.mark.parametrize("block", SELECTOR_BLOCKS)
def test_packaged_graph_is_what_the_exporter_makes(block: int) -> None:
    assert (DIRECTORY / f"block_{block}.onnx").read_bytes() == selector_bytes(block)


def test_prune_off_keeps_everything_and_says_so(screen: np.ndarray) -> None:
    selection = ppexport.select(screen, None, min_pixels=1)
    assert selection.keep.tolist() == list(range(20))
    assert selection.reason == "pruning is off"


def test_nothing_to_drop_is_said() -> None:
    noise = np.random.default_rng(1).integers(0, 255, (64, 96, 3), np.uint8)
    selection = ppexport.select(noise, min_pixels=1)
    assert selection.share == 1
    assert selection.reason == "no token repeats its neighbours"


def test_qwen2_block_size(screen: np.ndarray) -> None:
    selection = ppexport.select(screen[:112, :140], patch=14, merge=2, min_pixels=1)
    assert (selection.rows, selection.cols) == (4, 5)
    assert selection.keep.tolist() == pred_2d(screen[:112, :140], 28, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -0.1}, "tau is -0.1, expected a number from 0 to 1"),
        ({"tau": "0"}, "tau is '0', expected a number"),
        ({"tau": True}, "tau is True, expected a number"),
        ({"tau": float("nan")}, "tau is nan, expected a number from 0 to 1"),
        ({"method": "raster"}, "method is 'raster', expected one of: pred_2d, random"),
        ({"metric": "mae"}, "metric is 'mae', expected one of: max"),
        ({"tau": 0.05}, "anchored=True, which is not available yet"),
        ({"anchored": 1}, "anchored is 1, expected True or False"),
    ],
)
def test_impossible_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message.replace("(", r"\(")):
        ppexport.Prune(**arguments)


def test_random_keeps_as_many_as_pred_2d(screen: np.ndarray) -> None:
    count = ppexport.select(screen, min_pixels=1).kept
    found = [ppexport.select(screen, ppexport.Prune("random", seed=s), min_pixels=1) for s in (0, 0, 1)]
    for selection in found:
        check_selection(selection)
        assert selection.kept == count
    np.testing.assert_array_equal(found[0].keep, found[1].keep)
    assert found[0].keep.tolist() != found[2].keep.tolist()


def test_unknown_block_size(screen: np.ndarray) -> None:
    with pytest.raises(ppexport.RequestError, match="patch \\* merge is 60, expected one of: 28, 32"):
        ppexport.select(screen, patch=20, merge=3)


def test_the_mode_that_is_available_for_a_tau() -> None:
    assert ppexport.Prune.at(0.0) == ppexport.Prune()
    assert ppexport.Prune.at(0.003) == ppexport.Prune(tau=0.003)  # no byte may differ: threshold 0
    assert ppexport.Prune.at(0.05, "random") == ppexport.Prune("random", tau=0.05, anchored=False)


def test_prune_is_frozen() -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        ppexport.Prune().tau = 0.5  # type: ignore[misc]
