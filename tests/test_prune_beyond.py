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
from prune_spec import components, frame

import ppexport
from ppexport.exporters import unique
from ppexport.exporters.dialects import DIALECTS
from ppexport.exporters.prune import prune_graph
from ppexport.models.config import PRUNE_METRICS


@settings(max_examples=60, deadline=None)
@given(
    image=images(),
    level=st.sampled_from([0, 1, 3, 20, 255]),
    metric=st.sampled_from(PRUNE_METRICS),
    target=st.integers(0, 150),
    seed=st.integers(0, 2**31 - 2),
)
def test_components_equal_the_specification(image: np.ndarray, level: int, metric: str, target: int, seed: int) -> None:
    threshold = ppexport.Prune(metric=metric, tau=level / 255).threshold(BLOCK)
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
@given(image=images(), data=st.data(), metric=st.sampled_from(PRUNE_METRICS), level=st.sampled_from([0, 1, 3, 20]))
def test_temporal_equals_the_specification(image: np.ndarray, data: st.DataObject, metric: str, level: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    step = data.draw(st.sampled_from([0, 1, 4, 60]))
    where = rng.random(image.shape) < data.draw(st.sampled_from([0.002, 0.1]))
    reference = np.clip(image + where * rng.integers(-step, step + 1, image.shape), 0, 255).astype(np.uint8)
    threshold = ppexport.Prune(metric=metric, tau=level / 255).threshold(BLOCK)
    total = image.size // (3 * BLOCK**2)
    spatial = sorted(rng.choice(total, rng.integers(1, total + 1), replace=False).tolist())
    order = np.array([*spatial, *(i for i in range(total) if i not in spatial)], np.int32)
    kept, fresh = frame(image, reference, BLOCK, metric, threshold, spatial)
    inputs = {"image": image, "reference": reference, "threshold": np.array([threshold], np.int32)}
    inputs |= {"spatial_order": order, "spatial_count": np.array([len(spatial)], np.int32)}
    for dialect in DIALECTS:
        found, count, after = session(dialect, "temporal", metric).run(None, inputs)
        assert sorted(found.tolist()) == list(range(total))
        assert found[: count[0]].tolist() == kept
        np.testing.assert_array_equal(after, fresh)


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
    image = np.repeat(np.array([10, 10, 20, 10, 20, 20], np.uint8), BLOCK)[None, :, None].repeat(BLOCK, 0).repeat(3, 2)
    order, count = found.run(None, {"image": np.ascontiguousarray(image)})
    assert order[: count[0]].tolist() == [0, 2, 3, 4]
