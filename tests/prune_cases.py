"""Pictures and loaded graphs for the tests of pruning."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort
from hypothesis import strategies as st
from invariants import check_order

from ppexport.models.pruners.pixelprune import PREDICTORS, PRUNE_GRAPHS, graph_name, prune_file

BLOCK = 4  # small tokens, so that grids of 12 x 12 are small pictures
PAIRS = [(method, metric) for method, metric in PRUNE_GRAPHS if method in PREDICTORS]


@functools.cache
def session(dialect: str, method: str, metric: str, block: int = BLOCK) -> ort.InferenceSession:
    import onnx
    import onnx_ir as ir

    from ppexport.exporters.lowering.dialects import DIALECTS
    from ppexport.exporters.pruners import Sizes, pruning_graphs

    model = ir.to_proto(
        pruning_graphs(Sizes(block), DIALECTS[dialect])[prune_file(graph_name(method, metric))]
    )
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(found: ort.InferenceSession, image: np.ndarray, threshold: int, anchored: bool) -> list[int]:
    settings = {"threshold": np.array([threshold], np.int32), "anchored": np.array([anchored], np.int32)}
    order, count = found.run(["order", "count"], {"image": image, **settings})
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


def cut(image: np.ndarray) -> np.ndarray:
    """[N, BLOCK, BLOCK, 3]."""
    rows, cols = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    return image.reshape(rows, BLOCK, cols, BLOCK, 3).transpose(0, 2, 1, 3, 4).reshape(-1, BLOCK, BLOCK, 3)
