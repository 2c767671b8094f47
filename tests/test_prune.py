"""The pruning predictor: against the golden selections, against the specification, and its graph."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import GOLDEN, IMAGES, usual_and_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_selection
from prune_cases import BLOCK, PAIRS, cut, images, run, session
from prune_spec import anchors_of, distance, select, token, visit

import ppexport
from ppexport.exporters.lowering.dialects import DIALECTS
from ppexport.exporters.pruners import Sizes, pruning_graphs
from ppexport.exporters.pruners.packaged import DIRECTORY, packaged
from ppexport.models.pruners.pixelprune import PREDICTORS, PRUNE_GRAPHS, PRUNE_METRICS
from ppexport.runtime.backends import trt_api
from ppexport.runtime.backends.ort import OrtCpu
from ppexport.runtime.image import prepare
from ppexport.runtime.selector import Selector

SHARED_PHOTO = GOLDEN.parent.parent.parent / "shared" / "golden" / "images" / "doc_photo.jpg"
INDEX = json.loads((GOLDEN / "selection" / "index.json").read_text())


def source(name: str) -> Path:
    """The image; the one photo is not part of the repository."""
    path = IMAGES / name if (IMAGES / name).exists() else SHARED_PHOTO
    if not path.exists():
        pytest.skip(f"{name} is not part of the repository")
    return path


LEVELS = st.one_of(
    st.sampled_from([0, 1, 3, 20]), st.integers(0, 255)
)  # tau in 1 / 255, the interesting ones often
GOLDEN_CASES = [(name, case) for name, info in INDEX.items() for case in info["kept"]]


@pytest.mark.parametrize(("name", "case"), GOLDEN_CASES)
def test_selection_equals_the_reference(name: str, case: str) -> None:
    """Every case, although the reference compares floats: no distance of these images lies on a threshold."""
    expected = np.load(GOLDEN / "selection" / f"{name}.npz")
    method, metric, tau, mode = case.split("|")
    selection = ppexport.select(
        source(name), ppexport.PixelPrune(method, metric, float(tau), mode == "anchored")
    )
    check_selection(selection)
    _, h, w = expected["grid_thw"]
    assert (selection.rows, selection.cols) == (h // 2, w // 2)
    assert (selection.height, selection.width) == (h * 16, w * 16)
    np.testing.assert_array_equal(selection.keep, expected[case])
    assert selection.kept == INDEX[name]["kept"][case]


def test_every_kind_of_golden_case_is_there() -> None:
    kinds = {tuple(np.array(case.split("|"))[[0, 1, 3]]) for _, case in GOLDEN_CASES}
    assert {method for method, _, _ in kinds} == set(PREDICTORS)
    assert {metric for _, metric, _ in kinds} == set(PRUNE_METRICS)
    assert len(GOLDEN_CASES) == 80


@pytest.mark.parametrize(("method", "metric"), PAIRS)
@settings(max_examples=60, deadline=None)
@given(image=images(), level=LEVELS, anchored=st.booleans())
def test_graph_equals_the_specification(
    method: str, metric: str, image: np.ndarray, level: int, anchored: bool
) -> None:
    threshold = ppexport.PixelPrune(method, metric, level / 255).threshold(BLOCK)
    expected = select(image, BLOCK, method, metric, threshold, anchored)
    for dialect in DIALECTS:
        assert run(session(dialect, method, metric), image, threshold, anchored) == expected


@settings(max_examples=60, deadline=None)
@given(image=images(), level=LEVELS, pair=st.sampled_from(PAIRS))
def test_distances_are_those_to_the_prediction(image: np.ndarray, level: int, pair: tuple[str, str]) -> None:
    """Sliding, a token is dropped if and only if its distance is at most the threshold."""
    threshold = ppexport.PixelPrune(*pair, level / 255).threshold(BLOCK)
    kept = set(select(image, BLOCK, *pair, threshold, False))
    rows, cols = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    apart = lambda a, b: distance(pair[1], token(image, BLOCK, a), token(image, BLOCK, b))  # noqa: E731
    expected = [0] * (rows * cols)
    for index, before in visit(pair[0], rows, cols):
        expected[index] = apart(index, before(lambda a, b: apart(a, b) <= threshold))
    inputs = {
        "image": image,
        "threshold": np.array([threshold], np.int32),
        "anchored": np.array([0], np.int32),
    }
    for dialect in DIALECTS:
        (found,) = session(dialect, *pair).run(["distance"], inputs)
        assert found.tolist() == expected
        assert {0, *np.flatnonzero(found > threshold)} == kept


@settings(max_examples=60, deadline=None)
@given(image=images(), level=LEVELS, pair=st.sampled_from(PAIRS))
def test_anchored_errors_never_exceed_tau(image: np.ndarray, level: int, pair: tuple[str, str]) -> None:
    """Of what a decoder makes of the kept tokens and their places, which is all it gets."""
    threshold = ppexport.PixelPrune(*pair, level / 255).threshold(BLOCK)
    kept = run(session("ort", *pair), image, threshold, True)
    expected, anchors = anchors_of(image, BLOCK, *pair, threshold, True)
    assert set(kept) == expected == set(anchors.values())
    tokens = cut(image)
    rows, cols = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    rebuilt = decode({index: tokens[index] for index in kept}, rows, cols, *pair, threshold)
    for own, shown in zip(tokens, rebuilt, strict=True):
        assert distance(pair[1], own, shown) <= threshold


@settings(max_examples=60, deadline=None)
@given(image=images(), method=st.sampled_from(PREDICTORS), metric=st.sampled_from(PRUNE_METRICS))
def test_lossless_at_tau_0(image: np.ndarray, method: str, metric: str) -> None:
    """The kept tokens and their places give back every pixel."""
    kept = run(session("ort", method, metric), image, 0, True)
    tokens = cut(image)
    rows, cols = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    rebuilt = decode({index: tokens[index] for index in kept}, rows, cols, method)
    np.testing.assert_array_equal(rebuilt, tokens)


@settings(max_examples=40, deadline=None)
@given(image=images(), data=st.data())
def test_pred_2d_does_not_look_ahead(image: np.ndarray, data: st.DataObject) -> None:
    """Cutting tokens off the right or the bottom leaves the selection of the others as it was."""
    rows, cols = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    fewer_rows, fewer_cols = data.draw(st.integers(1, rows)), data.draw(st.integers(1, cols))
    whole = run(session("ort", "pred_2d", "max"), image, 3, True)
    part = run(
        session("ort", "pred_2d", "max"), image[: fewer_rows * BLOCK, : fewer_cols * BLOCK].copy(), 3, True
    )
    inside = [(i // cols, i % cols) for i in whole if i // cols < fewer_rows and i % cols < fewer_cols]
    assert [(i // fewer_cols, i % fewer_cols) for i in part] == inside


def decode(
    kept: dict[int, np.ndarray], rows: int, cols: int, method: str, metric: str = "max", threshold: int = 0
) -> np.ndarray:
    """Rebuild all tokens from the kept ones and their indices alone."""
    rebuilt = {0: kept[0]}
    like = lambda a, b: distance(metric, rebuilt[a], rebuilt[b]) <= threshold  # noqa: E731
    for index, before in visit(method, rows, cols):
        rebuilt[index] = kept[index] if index in kept else rebuilt[before(like)]
    return np.stack([rebuilt[i] for i in range(rows * cols)])


@pytest.mark.parametrize("name", INDEX)
def test_unique_on_real_images(name: str) -> None:
    assert ppexport.select(source(name), ppexport.PixelPrune("unique")).kept == INDEX[name]["unique_tokens"]


def test_sums_stay_exact_where_float32_would_not() -> None:
    """Squares of 3072 differences of 255 add up to 199,756,800, twelve times what float32 counts in ones."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 32:] = 255
    for metric, most in (("mae", 3072 * 255), ("rmse", 3072 * 255**2)):
        for dialect in DIALECTS:
            found = session(dialect, "pred_2d", metric, 32)
            assert run(found, image, most, False) == [0]
            assert run(found, image, most - 1, False) == [0, 1]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("method", "metric"), PRUNE_GRAPHS)
def test_selection_is_the_same_in_every_run_and_on_many_threads(
    method: str, metric: str, threads: int
) -> None:
    image = prepare(IMAGES / "web_gnuplot.png", 32, 1, 1 << 24)
    prune = ppexport.PixelPrune(method, metric, 0.0 if method == "unique" else 0.02)
    expected = ppexport.select(image, prune).keep
    selector = Selector(OrtCpu(threads), DIRECTORY / "32", 32)
    with ThreadPoolExecutor(4) as pool:
        for keep in pool.map(
            lambda _: selector.select(selector.backend.upload(image), prune)[1].keep, range(8)
        ):
            np.testing.assert_array_equal(keep, expected)


def test_graphs_use_standard_operators_and_no_nonzero() -> None:
    for dialect in DIALECTS.values():
        for graph in pruning_graphs(Sizes(32), dialect).values():
            nodes = list(graph.graph.all_nodes())
            assert {node.domain for node in nodes} == {""}
            assert "NonZero" not in {node.op_type for node in nodes}


@pytest.mark.parametrize(("method", "metric"), PRUNE_GRAPHS)
def test_the_form_for_older_onnxruntime_selects_the_same(method: str, metric: str) -> None:
    """It has no Max and Min on bytes: 1.23 has not; tests in an environment with that one run it for real."""
    newer, older = (Selector(OrtCpu(), DIRECTORY / "32", 32) for _ in range(2))
    older.byte_max = False
    for file in ("web_gnuplot.png", "gui_mousepad.png"):
        image = newer.backend.upload(prepare(IMAGES / file, 32, 1, 1 << 24))
        for tau in (0.0, 0.05) if method != "unique" else (0.0,):
            found = [
                each.select(image, ppexport.PixelPrune(method, metric, tau))[1].keep
                for each in (newer, older)
            ]
            np.testing.assert_array_equal(*found)


def test_packaged_graphs_are_what_the_exporter_makes() -> None:
    expected = packaged()
    assert set(expected) == {p for p in DIRECTORY.rglob("*") if p.is_file()}
    for path, content in expected.items():
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("dialect", ["standard", "plain"])
@pytest.mark.parametrize(
    "file",
    usual_and_slow(
        ["pixelprune.pred_2d.max.onnx", "pixelprune.unique.max.onnx"],
        pruning_graphs(Sizes(32), DIALECTS["standard"], after=("image",)),
    ),
)
def test_every_graph_on_pixels_compiles_for_tensorrt(dialect: str, file: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    log = trt_api.logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    model = ir.to_proto(pruning_graphs(Sizes(32), DIALECTS[dialect])[file]).SerializeToString()
    assert parser.parse(model), log.messages
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        if name in ("image", "reference"):
            profile.set_shape(name, (32, 32, 3), (640, 640, 3), (1920, 2048, 3))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config).nbytes > 10_000, log.messages
