"""The decoder graph: dialects, cache, batch rows, positions; and the prompt it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import GOLDEN
from invariants import relative_error

import ppexport
from ppexport.exporters import graphs
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.exporters.decoders import attention
from ppexport.exporters.lowering.dialects import DIALECTS
from ppexport.exporters.run_model import Asked, EagerModel
from ppexport.exporters.weights.attach import attach
from ppexport.models.family import Prompt
from ppexport.models.layout import lay_out, on_grid
from ppexport.models.precision import Wanted, resolve
from ppexport.runtime.language import Inputs
from ppexport.runtime.sampling import Sampling

IMAGE = 500
LAYERS, KV, DH, M = 4, 2, 32, 64


@dataclass(frozen=True)
class Decoder:
    """A decoder graph whose caches are [B, KV, M, DH] each, whatever form its dialect gives them."""

    session: ort.InferenceSession
    by_position: bool

    def run(self, _: None, inputs: dict[str, Any]) -> list[np.ndarray]:
        """Logits and the updated caches."""
        if "entries" in {value.name for value in self.session.get_inputs()} - set(inputs):
            used = int(inputs["start"].max()) + inputs["input_ids"].shape[1]
            inputs = {**inputs, "entries": np.arange(used, dtype=np.int32)}
        if not self.by_position:
            return self.session.run(None, inputs)
        names = [n for n in inputs if n.startswith(("key_", "value_"))]
        caches = np.stack([inputs[n].transpose(2, 0, 1, 3) for n in names])
        logits, rows = self.session.run(None, {**inputs, **dict(zip(names, caches, strict=True))})
        for b, start in enumerate(inputs["start"]):
            caches[:, start : start + rows.shape[1], b] = rows[:, :, b]
        return [logits, *caches.transpose(0, 2, 3, 1, 4)]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    """The golden decoder in every dialect, float32, on ONNX Runtime."""
    checkpoint = Checkpoint.open(GOLDEN / "e2e" / "model")
    directory = tmp_path_factory.mktemp("decoders")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    found = {}
    for name, dialect in DIALECTS.items():
        model = graphs.language_graph(checkpoint.config, dialect)
        precision = resolve(Wanted(), "fp32", "ort" if name == "cuda" else name, False)  # cuda: 16 bits only
        attach(model, checkpoint, "language", checkpoint.family.preprocessing, dialect, precision)
        path = directory / f"{name}.onnx"
        ir.save(model, path, external_data=f"{name}.data")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found[name] = Decoder(session, name == "plain")
    return found


def feed(
    rows: list[list[int]], start: list[int], logits_at: list[list[int]], caches: list[np.ndarray]
) -> dict[str, Any]:
    """Inputs of the decoder; image placeholders take random but fixed embeddings."""
    rng = np.random.default_rng(2)
    ids = np.array(rows, np.int32)
    is_image = ids == IMAGE
    K = max(1, int(is_image.sum()))
    positions = np.array(start, np.int32)[:, None] + np.arange(ids.shape[1], dtype=np.int32)
    names = [f"{kind}_{i}" for i in range(LAYERS) for kind in ("key", "value")]
    return {
        "input_ids": ids,
        "features": rng.normal(size=(4, K, 128)).astype(np.float32),
        "feature_rows": np.where(is_image, np.cumsum(is_image).reshape(ids.shape) - 1, -1).astype(np.int32),
        "position_ids": np.stack([positions, positions, positions]),
        "start": np.array(start, np.int32),
        "logits_at": np.array(logits_at, np.int32),
        **dict(zip(names, caches, strict=True)),
    }


def empty(batch: int) -> list[np.ndarray]:
    return [np.zeros((batch, KV, M, DH), np.float32) for _ in range(2 * LAYERS)]


@pytest.mark.parametrize("name", DIALECTS)
def test_cached_decode_equals_uncached_prefill(decoders: dict[str, Decoder], name: str) -> None:
    ids = [3, 9, IMAGE, IMAGE, IMAGE, 4, 77, 12, 30, 8]
    session = decoders[name]
    whole, *_ = session.run(None, feed([ids], [0], [list(range(len(ids)))], empty(1)))
    logits, *caches = session.run(None, feed([ids[:6]], [0], [[5]], empty(1)))
    found = [logits[0, 0]]
    for i, token in enumerate(ids[6:], start=6):
        logits, *caches = session.run(None, feed([[token]], [i], [[0]], caches))
        found.append(logits[0, 0])
    assert relative_error(np.stack(found), whole[0, 5:]) < 1e-4


@pytest.mark.parametrize("name", DIALECTS)
def test_prefill_in_two_parts_equals_one(decoders: dict[str, Decoder], name: str) -> None:
    ids = [3, 9, 14, 4, 77, 12, 30, 8]
    session = decoders[name]
    whole, *_ = session.run(None, feed([ids], [0], [[7]], empty(1)))
    _, *caches = session.run(None, feed([ids[:3]], [0], [[2]], empty(1)))
    parts, *_ = session.run(None, feed([ids[3:]], [3], [[4]], caches))
    assert relative_error(parts, whole) < 1e-4


def test_the_last_layer_goes_on_where_logits_are_wanted() -> None:
    """Behind its attention; those who look on (calibration, ranges of float16) are shown every position."""
    checkpoint = Checkpoint.open(GOLDEN / "e2e" / "model")
    seen: dict[str, int] = {}

    def on_input(graph: str, weight: str, x: torch.Tensor) -> None:
        seen[weight] = x.shape[1]

    eager = EagerModel(checkpoint, checkpoint.family.preprocessing, "test", on_input=on_input)
    asked = Asked(
        np.arange(6, dtype=np.int32),
        np.full(6, -1, np.int32),
        np.tile(np.arange(6, dtype=np.int32), (3, 1)),
        np.zeros((4, 1, 128), np.float32),
    )
    eager.logits(asked, 2)
    few = {weight for weight, count in seen.items() if count == 2}
    assert few == {f"layers.{LAYERS - 1}.{part}.weight" for part in ("o", "gate", "up", "down")}
    eager.decode(asked)
    assert set(seen.values()) == {6}


def test_features_behind_the_last_layer() -> None:
    """Of a model with as many levels of features as layers."""
    golden = Checkpoint.open(GOLDEN / "e2e" / "model").config
    model = dataclasses.replace(golden, text=dataclasses.replace(golden.text, layers=golden.levels))
    decoder = attention.Decoder(model)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    decoder.axis_freq = torch.rand(decoder.axis_freq.shape)
    given = feed([[3, IMAGE, IMAGE, 9, IMAGE]], [0], [[0]], empty(1))
    names = ("input_ids", "features", "feature_rows", "position_ids", "start")
    inputs = [torch.from_numpy(given[name]) for name in names]
    states = [torch.zeros(1, KV, 8, DH) for _ in range(2 * golden.levels)]
    with torch.no_grad():
        every, *_ = decoder(*inputs, torch.arange(5, dtype=torch.int32)[None], states)
        two, *_ = decoder(*inputs, torch.tensor([[4, 1]], dtype=torch.int32), states)
    assert torch.allclose(two[0], every[0, [4, 1]], atol=1e-5)


def test_dialects_agree_on_a_batch_with_different_starts(decoders: dict[str, Decoder]) -> None:
    first = [[3, 9, 14, 4], [5, 6, 0, 0]]  # the second row is two tokens long, the rest is padding
    rows = [[77], [80]]
    found = {}
    for name, session in decoders.items():
        logits, *caches = session.run(None, feed(first, [0, 0], [[3], [1]], empty(2)))
        more, *_ = session.run(None, feed(rows, [4, 2], [[0], [0]], caches))
        found[name] = np.stack([logits, more])
    for other in ("standard", "plain"):
        assert relative_error(found[other], found["ort"]) < 1e-4
    session = decoders["ort"]
    alone, *caches = session.run(None, feed([first[1][:2]], [0], [[1]], empty(1)))
    more, *_ = session.run(None, feed([rows[1]], [2], [[0]], caches))
    assert relative_error(found["ort"][:, 1:], np.stack([alone, more])) < 1e-4


def test_entries_that_hold_nothing_yet_change_nothing(decoders: dict[str, Decoder]) -> None:
    ids = [3, 9, 14, 4]
    found = [
        decoders["standard"].run(
            None, {**feed([ids], [0], [[3]], empty(1)), "entries": np.arange(count, dtype=np.int32)}
        )[0]
        for count in (4, 7, M)
    ]
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_dialects_agree_with_images(decoders: dict[str, Decoder]) -> None:
    ids = [3, *[IMAGE] * 20, 4, *[IMAGE] * 9, 8]
    at = [list(range(len(ids)))]
    a, *others = (decoders[name].run(None, feed([ids], [0], at, empty(1)))[0] for name in DIALECTS)
    for b in others:
        assert relative_error(b, a) < 1e-4


def selection(rows: int, cols: int, keep: list[int]) -> ppexport.Selection:
    return ppexport.Selection(
        np.array(keep, np.int32), rows, cols, cols * 32, rows * 32, "", ppexport.PixelPrune()
    )


def laid_out(ids: np.ndarray, selections: list[ppexport.Selection]) -> Prompt:
    return lay_out(ids, IMAGE, [selection.as_kept() for selection in selections], 3, on_grid)


def test_positions_follow_the_full_grid() -> None:
    ids = np.array([1, 2, *[IMAGE] * 6, 3, *[IMAGE] * 2, 4, 5])
    prompt = laid_out(ids, [selection(2, 3, [0, 4, 5]), selection(2, 1, [1])])
    assert prompt.ids.tolist() == [1, 2, IMAGE, IMAGE, IMAGE, 3, IMAGE, 4, 5]
    assert prompt.positions.tolist() == [
        [0, 1, 2, 2, 2, 5, 6, 8, 9],
        [0, 1, 2, 3, 3, 5, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 6, 8, 9],
    ]
    assert prompt.image_of.tolist() == [-1, -1, 0, 0, 0, -1, 1, -1, -1]
    assert prompt.next_position == 10
    assert prompt.full_length == len(ids)


def test_adjacent_images_are_told_apart_by_their_sizes() -> None:
    prompt = laid_out(np.array([IMAGE] * 5), [selection(1, 2, [0, 1]), selection(1, 3, [0, 1, 2])])
    assert prompt.positions[2].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, *[IMAGE] * 5, 2], r"runs of \[5\] tokens, expected \[6\] \(of 1 whole images\)"),
        ([1, 2], r"runs of \[\] tokens, expected \[6\]"),
        ([*[IMAGE] * 3, 1, *[IMAGE] * 3], r"runs of \[3, 3\] tokens, expected \[6\]"),
    ],
)
def test_placeholders_that_do_not_match(ids: list[int], message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        laid_out(np.array(ids), [selection(2, 3, [0])])


def test_greedy_and_sampled_choice() -> None:
    logits = np.array([0.0, 3.0, 2.0, -5.0], np.float32)
    assert Sampling().choose(logits, np.random.default_rng(0)) == 1
    rng = Sampling(1.0, seed=4).rng()
    draws = [Sampling(1.0).choose(logits, rng) for _ in range(2000)]
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 2000, expected, atol=0.04)
    assert {Sampling(1.0, top_k=2).choose(logits, rng) for _ in range(200)} == {1, 2}
    assert {Sampling(1.0, top_p=0.5).choose(logits, rng) for _ in range(200)} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"top_k": -1}, "top_k is -1, expected at least 0"),
    ],
)
def test_impossible_sampling(arguments: dict, message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        Sampling(**arguments)


def test_same_seed_same_tokens(tiny_pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    def tokens(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        ids = tiny_pipe.text.encode("Hello", [20])  # type: ignore[union-attr]
        return [
            s.token for s in tiny_pipe.generate_tokens(ids, [screen], max_new_tokens=12, sampling=sampling)
        ]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_caches_are_updated_in_place(golden_pipe: ppexport.Pipeline) -> None:
    """No step allocates or copies a cache: the bound pointers stay and hold the new entries."""
    language = golden_pipe.language
    slots = language.slots(8)

    def run(ids: list[int], start: int) -> None:
        positions = np.broadcast_to(np.arange(start, start + len(ids), dtype=np.int32), (3, 1, len(ids)))
        rows = np.full((1, len(ids)), -1, np.int32)
        inputs = Inputs(
            np.array([ids], np.int32), rows, np.ascontiguousarray(positions), np.array([start], np.int32)
        )
        language.run(slots, 0, [0], inputs, None)

    run([3, 4, 5], 0)
    bound = slots.runs[0, 1].binding._bound  # type: ignore[attr-defined]
    keys = golden_pipe.backend.download(bound["key_0"])
    assert bound["key_0"] is bound["new_key_0"]
    assert np.abs(keys[0, :, :3]).min(axis=(0, 2)).min() > 0
    assert not keys[0, :, 3:].any()
    before = keys[0, :, :3].copy()
    run([6], 3)
    assert bound["key_0"] is slots.runs[0, 1].binding._bound["key_0"]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(keys[0, :, :3], before)
    assert keys[0, :, 3].any()
    assert not keys[0, :, 4:].any()


def test_stop_token_ends_the_answer(golden_bundle: Path, golden_pipe: ppexport.Pipeline) -> None:
    steps = golden_pipe.generate_tokens([1, 2, 3], max_new_tokens=4)
    first = next(steps).token
    pipe = ppexport.load(golden_bundle)
    pipe.manifest = dataclasses.replace(pipe.manifest, stop_tokens=(first,))
    stats = ppexport.Stats()
    assert [s.token for s in pipe.generate_tokens([1, 2, 3], max_new_tokens=4, stats=stats)] == [first]
    assert stats.finish == "stop"


def take(steps: Iterator[ppexport.Step], count: int) -> list[int]:
    return [next(steps).token for _ in range(count)]


def test_interleaved_requests_do_not_disturb_each_other(golden_pipe: ppexport.Pipeline) -> None:
    alone = {n: take(golden_pipe.generate_tokens([n, 2, 3], max_new_tokens=6), 6) for n in (10, 20)}
    a, b = (golden_pipe.generate_tokens([n, 2, 3], max_new_tokens=6) for n in (10, 20))
    mixed = [(next(a).token, next(b).token) for _ in range(6)]
    assert [x for x, _ in mixed] == alone[10]
    assert [y for _, y in mixed] == alone[20]


def test_threads_may_share_a_pipeline(golden_pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    """Four threads with different images and prompts get what each gets alone."""

    def request(n: int) -> list[int]:
        total = ppexport.select(screen[n * 8 :], max_pixels=600000).total
        ids = [n, *[IMAGE] * total, n + 1, 7]
        return [step.token for step in golden_pipe.generate_tokens(ids, [screen[n * 8 :]], max_new_tokens=16)]

    alone = [request(n) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(request, [0, 1, 2, 3] * 3)) == alone * 3
