"""The pruning predictor: against the golden selections, against the specification, and its graph."""

from __future__ import annotations

import functools
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import GOLDEN, IMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_order, check_selection
from prune_spec import anchors_of, distance, select, visit

import ppexport
from ppexport.exporters import unique
from ppexport.exporters.dialects import DIALECTS
from ppexport.exporters.prune import prune_graph
from ppexport.exporters.selectors import DIRECTORY, packaged
from ppexport.models.config import PRUNE_GRAPHS, PRUNE_METRICS
from ppexport.runtime import trt_api

SHARED_PHOTO = GOLDEN.parent.parent.parent / "shared" / "golden" / "images" / "doc_photo.jpg"
INDEX = json.loads((GOLDEN / "selection" / "index.json").read_text())


def source(name: str) -> Path:
    """The image; the one photo is not part of the repository."""
    path = IMAGES / name if (IMAGES / name).exists() else SHARED_PHOTO
    if not path.exists():
        pytest.skip(f"{name} is not part of the repository")
    return path


GOLDEN_CASES = [(name, case) for name, info in INDEX.items() for case in info["kept"]]


@pytest.mark.parametrize(("name", "case"), GOLDEN_CASES)
def test_selection_equals_the_reference(name: str, case: str) -> None:
    """Every case, although the reference compares floats: no distance of these images lies on a threshold."""
    expected = np.load(GOLDEN / "selection" / f"{name}.npz")
    method, metric, tau, mode = case.split("|")
    selection = ppexport.select(source(name), ppexport.Prune(method, metric, float(tau), mode == "anchored"))
    check_selection(selection)
    _, h, w = expected["grid_thw"]
    assert (selection.rows, selection.cols) == (h // 2, w // 2)
    assert (selection.height, selection.width) == (h * 16, w * 16)
    np.testing.assert_array_equal(selection.keep, expected[case])
    assert selection.kept == INDEX[name]["kept"][case]


def test_every_kind_of_golden_case_is_there() -> None:
    kinds = {tuple(np.array(case.split("|"))[[0, 1, 3]]) for _, case in GOLDEN_CASES}
    assert {method for method, _, _ in kinds} == set(SCANS)
    assert {metric for _, metric, _ in kinds} == set(PRUNE_METRICS)
    assert len(GOLDEN_CASES) == 80


BLOCK = 4  # small tokens, so that grids of 12 x 12 are small pictures
PAIRS = [(method, metric) for method, metric in PRUNE_GRAPHS if method != "unique"]
SCANS = ("pred_2d", "raster", "serpentine")


@functools.cache
def session(dialect: str, method: str, metric: str, block: int = BLOCK) -> ort.InferenceSession:
    model = ir.to_proto(prune_graph(block, DIALECTS[dialect], method, metric))
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(found: ort.InferenceSession, image: np.ndarray, threshold: int, anchored: bool) -> list[int]:
    settings = {"threshold": np.array([threshold], np.int32), "anchored": np.array([anchored], np.int32)}
    order, count = found.run(None, {"image": image, **settings})
    check_order(order, count, len(order))
    return order[: count[0]].tolist()


@st.composite
def images(draw: st.DrawFn) -> np.ndarray:
    """Grids from 1 x 1 to 12 x 12: few distinct tokens, disturbed bytes, gradients that drift, stripes, checkers."""
    rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    palette = rng.integers(0, 256, (draw(st.integers(1, 4)), BLOCK, BLOCK, 3), np.uint8)
    row, col = np.indices((rows, cols))
    kind = draw(st.sampled_from(["random", "stripes", "checkers", "tiles", "drift"]))
    which = {
        "random": rng.integers(0, len(palette), (rows, cols)),
        "stripes": row if draw(st.booleans()) else col,
        "checkers": row + col,
        "tiles": (row % 3) * 3 + col % 3,
        "drift": np.zeros((rows, cols), int),
    }[kind]
    tokens = palette[which % len(palette)].astype(int)
    if kind == "drift":
        tokens += (row * draw(st.integers(-3, 3)) + col * draw(st.integers(-3, 3)))[:, :, None, None, None]
    step = draw(st.sampled_from([0, 0, 1, 3, 40]))
    where = rng.random(tokens.shape) < draw(st.sampled_from([0.02, 0.5]))
    tokens = np.clip(tokens + where * rng.integers(-step, step + 1, tokens.shape), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(tokens.transpose(0, 2, 1, 3, 4).reshape(rows * BLOCK, cols * BLOCK, 3))


@pytest.mark.parametrize(("method", "metric"), PAIRS)
@settings(max_examples=60, deadline=None)
@given(image=images(), level=st.sampled_from([0, 1, 2, 3, 5, 20, 254, 255]), anchored=st.booleans())
def test_graph_equals_the_specification(
    method: str, metric: str, image: np.ndarray, level: int, anchored: bool
) -> None:
    threshold = ppexport.Prune(method, metric, level / 255).threshold(BLOCK)
    expected = select(image, BLOCK, method, metric, threshold, anchored)
    for dialect in DIALECTS:
        assert run(session(dialect, method, metric), image, threshold, anchored) == expected


@settings(max_examples=60, deadline=None)
@given(image=images(), level=st.sampled_from([1, 3, 20]), pair=st.sampled_from(PAIRS))
def test_anchored_errors_never_exceed_tau(image: np.ndarray, level: int, pair: tuple[str, str]) -> None:
    threshold = ppexport.Prune(*pair, level / 255).threshold(BLOCK)
    kept = run(session("ort", *pair), image, threshold, True)
    expected, anchors = anchors_of(image, BLOCK, *pair, threshold, True)
    assert set(kept) == expected == set(anchors.values())
    tokens = cut(image)
    for index, anchor in anchors.items():
        assert distance(pair[1], tokens[index], tokens[anchor]) <= threshold


@settings(max_examples=60, deadline=None)
@given(image=images(), method=st.sampled_from(SCANS), metric=st.sampled_from(PRUNE_METRICS))
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
    part = run(session("ort", "pred_2d", "max"), image[: fewer_rows * BLOCK, : fewer_cols * BLOCK].copy(), 3, True)
    inside = [(i // cols, i % cols) for i in whole if i // cols < fewer_rows and i % cols < fewer_cols]
    assert [(i // fewer_cols, i % fewer_cols) for i in part] == inside


def cut(image: np.ndarray) -> np.ndarray:
    """[N, BLOCK, BLOCK, 3]."""
    rows, cols = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    return image.reshape(rows, BLOCK, cols, BLOCK, 3).transpose(0, 2, 1, 3, 4).reshape(-1, BLOCK, BLOCK, 3)


def decode(kept: dict[int, np.ndarray], rows: int, cols: int, method: str) -> np.ndarray:
    """Rebuild all tokens from the kept ones and their indices alone."""
    rebuilt = {0: kept[0]}
    same = lambda a, b: bool((rebuilt[a] == rebuilt[b]).all())  # noqa: E731
    for index, before in visit(method, rows, cols):
        rebuilt[index] = kept[index] if index in kept else rebuilt[before(same)]
    return np.stack([rebuilt[i] for i in range(rows * cols)])


@settings(max_examples=60, deadline=None)
@given(image=images())
def test_unique_keeps_the_first_of_all_equal_tokens(image: np.ndarray) -> None:
    tokens = [token.tobytes() for token in cut(image)]
    expected = [i for i, token in enumerate(tokens) if token not in tokens[:i]]
    for dialect in DIALECTS:
        order, count = session(dialect, "unique", "max").run(None, {"image": image})
        check_order(order, count, len(tokens))
        assert order[: count[0]].tolist() == expected


@pytest.mark.parametrize("name", INDEX)
def test_unique_on_real_images(name: str) -> None:
    assert ppexport.select(source(name), ppexport.Prune("unique")).kept == INDEX[name]["unique_tokens"]


def test_unique_drops_nothing_whose_hash_alone_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of zero all hashes are equal: then a token is dropped only next to its copy, and never wrongly."""
    monkeypatch.setattr(unique, "weights", lambda size: np.zeros((size, unique.SUMS), np.int8))
    model = ir.to_proto(prune_graph(BLOCK, DIALECTS["ort"], "unique", "max"))
    found = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.repeat(np.array([10, 10, 20, 10, 20, 20], np.uint8), BLOCK)[None, :, None].repeat(BLOCK, 0).repeat(3, 2)
    order, count = found.run(None, {"image": np.ascontiguousarray(image)})
    assert order[: count[0]].tolist() == [0, 2, 3, 4]


def test_sums_stay_exact_where_float32_would_not() -> None:
    """Squares of 3072 differences of 255 add up to 199,756,800, twelve times what float32 counts in ones."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 32:] = 255
    for metric, most in (("mae", 3072 * 255), ("rmse", 3072 * 255**2)):
        for dialect in DIALECTS:
            found = session(dialect, "pred_2d", metric, 32)
            assert run(found, image, most, False) == [0]
            assert run(found, image, most - 1, False) == [0, 1]


def test_selection_is_the_same_on_many_threads(screen: np.ndarray) -> None:
    prune = ppexport.Prune(tau=0.02)
    expected = ppexport.select(screen, prune, min_pixels=1).keep
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: ppexport.select(screen, prune, min_pixels=1), range(20)):
            np.testing.assert_array_equal(found.keep, expected)


def test_graphs_use_standard_operators_and_no_nonzero() -> None:
    for dialect, (method, metric) in itertools.product(DIALECTS.values(), PRUNE_GRAPHS):
        nodes = list(prune_graph(32, dialect, method, metric).graph.all_nodes())
        assert {node.domain for node in nodes} == {""}
        assert "NonZero" not in {node.op_type for node in nodes}


def test_packaged_graphs_are_what_the_exporter_makes() -> None:
    expected = packaged()
    assert set(expected) == {p for p in DIRECTORY.rglob("*") if p.is_file()}
    for path, content in expected.items():
        assert path.read_bytes() == content, path


@pytest.mark.parametrize("dialect", ["standard", "plain"])
@pytest.mark.parametrize(("method", "metric"), PRUNE_GRAPHS)
def test_every_graph_compiles_for_tensorrt(dialect: str, method: str, metric: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    log = trt_api.logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    model = ir.to_proto(prune_graph(32, DIALECTS[dialect], method, metric)).SerializeToString()
    assert parser.parse(model), log.messages
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("image", (32, 32, 3), (640, 640, 3), (1920, 2048, 3))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config).nbytes > 10_000, log.messages


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
    assert selection.keep.tolist() == select(screen[:112, :140], 28, "pred_2d", "max", 0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -0.1}, "tau is -0.1, expected a number from 0 to 1"),
        ({"tau": "0"}, "tau is '0', expected a number"),
        ({"tau": True}, "tau is True, expected a number"),
        ({"tau": float("nan")}, "tau is nan, expected a number from 0 to 1"),
        ({"method": "best"}, "method is 'best', expected one of: pred_2d, raster, serpentine, unique, random"),
        ({"method": "unique", "tau": 0.1}, "method 'unique' has metric 'max' and tau 0.1, expected 'max' and 0"),
        ({"metric": "ssim"}, "metric is 'ssim', expected one of: max, mae, rmse"),
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


def test_thresholds_are_whole_numbers_at_every_level() -> None:
    """tau = k / 255 is exactly k for max, k times the bytes of a token for mae, and so on: no rounding down."""
    for k in range(256):
        for metric, expected in (("max", k), ("mae", k * 3072), ("rmse", k * k * 3072)):
            assert ppexport.Prune(metric=metric, tau=k / 255).threshold(32) == expected


def test_prune_is_frozen() -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        ppexport.Prune().tau = 0.5  # type: ignore[misc]
