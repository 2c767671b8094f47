"""What the pruning graphs do beyond prediction in space: components, frames, copies anywhere."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_order
from prune_cases import BLOCK, cut, images, session
from prune_spec import components, distance, frame, token

import ppexport
from ppexport.exporters.lowering.dialects import DIALECTS
from ppexport.exporters.pruners import unique
from ppexport.exporters.pruners.pixelprune import prune_graph
from ppexport.models.pruners.pixelprune import PRUNE_METRICS


@settings(max_examples=60, deadline=None)
@given(
    image=images(),
    level=st.integers(0, 255),
    metric=st.sampled_from(PRUNE_METRICS),
    target=st.integers(0, 150),
    seed=st.integers(0, 2**31 - 2),
)
def test_components_equal_the_specification(
    image: np.ndarray, level: int, metric: str, target: int, seed: int
) -> None:
    threshold = ppexport.PixelPrune(metric=metric, tau=level / 255).threshold(BLOCK)
    expected = components(image, BLOCK, metric, threshold, target, seed)
    numbers = {"threshold": threshold, "target": target, "seed": seed}
    inputs = {"image": image, **{name: np.array([n], np.int32) for name, n in numbers.items()}}
    for dialect in DIALECTS:
        order, count = session(dialect, "conncomp", metric).run(None, inputs)
        check_order(order, count, len(order))
        assert order[: count[0]].tolist() == expected


def test_components_follow_winding_ways() -> None:
    """A way that covers the picture line by line is one component; what lies between its lines is one for each gap."""
    grid = np.full((13, 12), 255, np.uint8)
    grid[1::2] = 0
    grid[1::4, -1] = grid[3::4, 0] = 255
    image = grid.repeat(BLOCK, 0).repeat(BLOCK, 1)[:, :, None].repeat(3, 2).copy()
    inputs = {"image": image, **{n: np.array([0], np.int32) for n in ("threshold", "target", "seed")}}
    for dialect in DIALECTS:
        order, count = session(dialect, "conncomp", "max").run(None, inputs)
        assert order[: count[0]].tolist() == components(image, BLOCK, "max", 0, 0, 0)
        assert count[0] == 1 + 6


@settings(max_examples=60, deadline=None)
@given(
    image=images(),
    data=st.data(),
    metric=st.sampled_from(PRUNE_METRICS),
    level=st.one_of(st.sampled_from([0, 1, 3, 20]), st.integers(0, 255)),
    anchored=st.booleans(),
)
def test_frames_equal_the_specification(
    image: np.ndarray, data: st.DataObject, metric: str, level: int, anchored: bool
) -> None:
    """Three frames in a row: noise, tokens that move, light that changes."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    threshold = ppexport.PixelPrune(metric=metric, tau=level / 255).threshold(BLOCK)
    shown: np.ndarray | None = None
    pictures = dict.fromkeys(DIALECTS, image)
    for _ in range(3):
        kept, after = frame(image, shown, BLOCK, metric, threshold, anchored)
        if anchored:
            for i in range(image.size // (3 * BLOCK**2)):
                assert distance(metric, token(image, BLOCK, i), token(after, BLOCK, i)) <= threshold
        numbers = {"first": shown is None, "threshold": threshold, "anchored": anchored}
        inputs = {"image": image, **{name: np.array([n], np.int32) for name, n in numbers.items()}}
        for dialect in DIALECTS:
            inputs["reference"] = pictures[dialect]
            order, count, pictures[dialect] = session(dialect, "temporal", metric).run(None, inputs)
            assert sorted(order.tolist()) == list(range(len(order)))
            assert order[: count[0]].tolist() == kept
            np.testing.assert_array_equal(pictures[dialect], after)
        shown = after
        step = data.draw(st.sampled_from([0, 1, 4, 60]))
        where = rng.random(image.shape) < data.draw(st.sampled_from([0.002, 0.1]))
        changed = image.astype(int) + where * rng.integers(-step, step + 1, image.shape)
        changed += data.draw(st.sampled_from([0, 0, 1, 5]))
        image = np.clip(changed, 0, 255).astype(np.uint8)
        if data.draw(st.booleans()):
            image = np.ascontiguousarray(np.roll(image, BLOCK, axis=data.draw(st.integers(0, 1))))


@pytest.mark.parametrize(("rows", "cols"), [(34, 34), (1, 89), (55, 55), (20, 89), (89, 20)])
def test_every_component_keeps_its_share(rows: int, cols: int) -> None:
    """Strips of one token's width, down and across: each keeps 30 % of its tokens, give or take."""
    for axis in (0, 1):
        row, col = np.indices((rows, cols))
        grid = ((row if axis else col) * 97 % 251).astype(np.uint8)
        image = grid.repeat(BLOCK, 0).repeat(BLOCK, 1)[:, :, None].repeat(3, 2).copy()
        length = cols if axis else rows
        if length < 20:
            continue
        numbers = {"threshold": 0, "target": int(0.3 * rows * cols), "seed": 1}
        inputs = {"image": image, **{n: np.array([v], np.int32) for n, v in numbers.items()}}
        order, count = session("ort", "conncomp", "max").run(None, inputs)
        kept = np.bincount((order[: count[0]] // cols) if axis else (order[: count[0]] % cols))
        assert abs(kept - 0.3 * length).max() <= 2 + 0.05 * length


@settings(max_examples=60, deadline=None)
@given(image=images())
def test_unique_keeps_the_first_of_all_equal_tokens(image: np.ndarray) -> None:
    tokens = [token.tobytes() for token in cut(image)]
    expected = [i for i, token in enumerate(tokens) if token not in tokens[:i]]
    for dialect in DIALECTS:
        order, count = session(dialect, "unique", "max").run(None, {"image": image})
        check_order(order, count, len(tokens))
        assert order[: count[0]].tolist() == expected


def test_unique_drops_nothing_whose_hash_alone_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of zero all hashes are equal: then a token is dropped only next to its copy, and never wrongly."""
    monkeypatch.setattr(unique, "weights", lambda size: np.zeros((size, unique.SUMS), np.int8))
    model = ir.to_proto(prune_graph(BLOCK, DIALECTS["ort"], "unique", "max"))
    found = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = (
        np.repeat(np.array([10, 10, 20, 10, 20, 20], np.uint8), BLOCK)[None, :, None]
        .repeat(BLOCK, 0)
        .repeat(3, 2)
    )
    order, count = found.run(None, {"image": np.ascontiguousarray(image)})
    assert order[: count[0]].tolist() == [0, 2, 3, 4]
