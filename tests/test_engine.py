"""Requests that run together give what each gives alone, whatever the others do."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from conftest import E2E_PIXELS, IMAGES

import ppexport
from ppexport.runtime import engine
from ppexport.runtime.answer import Steps
from ppexport.runtime.sequence import Sequence

IMAGE = 500
PICTURES = [IMAGES / "web_gnuplot.png", IMAGES / "gui_mousepad.png"]


@pytest.fixture(scope="module")
def totals() -> list[int]:
    return [ppexport.select(picture, max_pixels=E2E_PIXELS).total for picture in PICTURES]


@pytest.fixture(scope="module", params=["golden", "golden-int4", "golden-plain"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(name: str, bundle_of: Callable[[str], Path]) -> Path:
    return bundle_of(name)


@pytest.fixture
def pipe(bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(bundle, max_pixels=E2E_PIXELS)


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Callable[..., list[ppexport.Step]]:
    """Steps of a request that runs by itself; computed once."""
    pipe = ppexport.load(bundle, max_pixels=E2E_PIXELS, reuse=0)
    known: dict[str, list[ppexport.Step]] = {}

    def run(*request: Any) -> list[ppexport.Step]:
        key = repr(request)
        if key not in known:
            known[key] = list(pipe.generate_tokens(*request[:4], stop=()))
        return known[key]

    return run


def requests(totals: list[int]) -> list[tuple[Any, ...]]:
    """ids, images, prune and length of answers: text alone, an image, two; pruned and not; short and long."""
    first, second = ([IMAGE] * n for n in totals)
    return [
        ([1, 2, 3], [], None, 24),
        ([1, *first, 2, 7], PICTURES[:1], ppexport.PixelPrune(), 12),
        ([5] * 40, [], None, 3),
        ([1, *first, 9, *second, 2], PICTURES, ppexport.PixelPrune(), 8),
        ([8, *second, 2], PICTURES[1:], None, 16),
        ([7], [], None, 1),
        ([40, 41, *second, 3, 4, 5], PICTURES[1:], ppexport.PixelPrune(tau=0.02), 20),
        (list(range(10, 90)), [], None, 30),
    ]


def start(pipe: ppexport.Pipeline, request: tuple[Any, ...], ahead: int | None = None) -> Sequence:
    ids, images, prune, length = request
    sequence = pipe.prepare_tokens(ids, images, prune, length, stop=(), ahead=ahead)
    pipe.engine.add(sequence)
    return sequence


def run_out(pipe: ppexport.Pipeline, sequences: list[Sequence]) -> list[list[ppexport.Step]]:
    while not all(sequence.finished for sequence in sequences):
        pipe.engine.step()
    return [list(sequence.pending) for sequence in sequences]


@pytest.fixture
def same(name: str) -> Callable[..., None]:
    """Equal tokens and logits: bit for bit on the graphs for ONNX Runtime in float32.

    In plain graphs a prompt in chunks sums up in another order, and on CPUs without VNNI products in four bits do so
    for several rows; there they round what they are multiplied with to eight bits, too, which makes that larger.
    """

    def check(found: list[ppexport.Step], expected: list[ppexport.Step], exact: bool = True) -> None:
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            if exact and name == "golden":
                np.testing.assert_array_equal(a.logits, b.logits)
            else:
                share = 3e-2 if name == "golden-int4" else 2e-5
                np.testing.assert_allclose(a.logits, b.logits, atol=share * np.abs(b.logits).max())
            if a.token != b.token:
                assert name == "golden-int4"
                return  # the others are of other tokens

    return check


def test_together_equals_alone(pipe: ppexport.Pipeline, alone: Any, same: Any, totals: list[int]) -> None:
    """Eight at once, bit for bit: prompts of 1 to 1600 tokens, answers that end early, slots that lie idle then."""
    asked = requests(totals)
    sequences = [start(pipe, request) for request in asked]
    for sequence, found, request in zip(sequences, run_out(pipe, sequences), asked, strict=True):
        same(found, alone(*request))
        assert sequence.error is None
        assert sequence.stats.finish == "length"
    most = max(len(slots.listed) for slots in pipe.engine.placement.pools)
    assert most == (8 if pipe.language.batches else 1)


def test_reuse_while_others_run(pipe: ppexport.Pipeline, alone: Any, same: Any, totals: list[int]) -> None:
    """Second questions find the first ones' slots, in the middle of the others' answers."""
    asked = requests(totals)
    run_out(pipe, [start(pipe, request) for request in asked[:4]])
    again = [(*([*ids, 11, 12], images, prune, 6),) for ids, images, prune, _ in asked[:4]]
    others = [start(pipe, request) for request in asked[4:]]
    for _ in range(3):
        pipe.engine.step()
    second = [start(pipe, request) for request in again]
    for found, request in zip(run_out(pipe, others), asked[4:], strict=True):
        same(found, alone(*request))
    for sequence, request in zip(second, again, strict=True):
        run_out(pipe, [sequence])
        same(list(sequence.pending), alone(*request), exact=False)  # a prompt in two parts, as without others
    # of the first one, the prompt is a small part
    assert [sequence.stats.reused_tokens > 0 for sequence in second] == [False, True, True, True]


def test_a_long_prompt_goes_in_chunks(
    pipe: ppexport.Pipeline, alone: Any, same: Any, totals: list[int]
) -> None:
    """Between its chunks the others get their tokens; what it computes is what it computes in one go."""
    talker = start(pipe, ([1, 2, 3], [], None, 24))
    pipe.engine.step()
    assert len(talker.pending) == 1
    long = start(pipe, requests(totals)[4])
    steps = 0
    while not long.pending:
        pipe.engine.step()
        steps += 1
    chunks = -(-len(long.prompt.ids) // engine.CHUNK)
    assert steps == chunks + 1  # and its image
    assert len(talker.pending) == 1 + steps
    found = run_out(pipe, [talker, long])
    same(found[0], alone([1, 2, 3], [], None, 24))
    same(found[1], alone(*requests(totals)[4]), exact=False)


def test_cancelled_requests_leave_the_others_alone(
    pipe: ppexport.Pipeline, alone: Any, same: Any, totals: list[int]
) -> None:
    """One waits, one is in its prompt, one in its answer; what the last one computed is found again."""
    asked = requests(totals)
    kept = [start(pipe, asked[0]), start(pipe, asked[7])]
    gone = [start(pipe, ([3, 4, 5, 6], [], None, 30)), start(pipe, asked[3]), start(pipe, asked[4])]
    for _ in range(5):
        pipe.engine.step()
    for sequence in gone:
        pipe.engine.cancel(sequence)
    assert len(gone[0].pending) > 1
    for found, request in zip(run_out(pipe, kept), (asked[0], asked[7]), strict=True):
        same(found, alone(*request))
    assert not any(sequence.finished for sequence in gone[1:])
    said = [step.token for step in gone[0].pending][:2]
    after = start(pipe, ([3, 4, 5, 6, *said, 9], [], None, 4))
    run_out(pipe, [after])
    assert after.stats.reused_tokens == 6


def test_more_requests_than_run_at_once(bundle: Path, alone: Any, same: Any) -> None:
    pipe = ppexport.load(bundle, together=3)
    asked = [([n, 2, 3], [], None, 2 + n % 5) for n in range(10, 20)]
    sequences = [start(pipe, request) for request in asked]
    running = 0
    while not all(sequence.finished for sequence in sequences):
        pipe.engine.step()
        running = max(running, sum(sequence.slot is not None for sequence in sequences))
    assert running == 3
    for sequence, request in zip(sequences, asked, strict=True):
        same(list(sequence.pending), alone(*request))
    assert max(len(slots.listed) for slots in pipe.engine.placement.pools) <= 3


def test_unread_answers_keep_nobody_from_running(bundle: Path) -> None:
    """Readers that stop in the middle, as many as run at once: the next one gets its answer all the same."""
    pipe = ppexport.load(bundle, together=2)
    stopped = [pipe.generate_tokens([n, 2, 3], max_new_tokens=200, stop=()) for n in (10, 20, 30)]
    for steps in stopped:
        next(steps)
    assert len(list(pipe.generate_tokens([40, 2, 3], max_new_tokens=40, stop=()))) == 40
    ran = [sequence.stats.generated_tokens for sequence in pipe.engine._active]
    assert len(ran) == 3
    assert max(ran) <= 1 + 16  # they do not run on for nobody


def test_one_that_fails_does_not_stop_the_others(
    pipe: ppexport.Pipeline, alone: Any, same: Any, monkeypatch: Any
) -> None:
    good = start(pipe, ([1, 2, 3], [], None, 24))
    bad = pipe.generate_tokens([4, 5, 6], max_new_tokens=9, stop=())
    next(bad)
    monkeypatch.setattr(bad._sequence, "sampling", None)
    with pytest.raises(AttributeError):
        list(bad)
    run_out(pipe, [good])
    same(list(good.pending), alone([1, 2, 3], [], None, 24))
    assert not pipe.engine._active


def test_an_interrupted_growth_ends_those_inside(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while memory moves: the others hear of it, rather than going on with half of their entries."""
    pipe = ppexport.load(golden_bundle)
    first, second = (pipe.generate_tokens([n, 2, 3], max_new_tokens=300, stop=()) for n in (10, 20))
    next(first), next(second)
    zeros = pipe.backend.zeros
    calls = itertools.count()

    def interrupted(*given: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return zeros(*given)

    monkeypatch.setattr(pipe.backend, "zeros", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(first)
    with pytest.raises(ppexport.BackendError, match="a run of several requests was interrupted; ask again"):
        list(second)
    monkeypatch.setattr(pipe.backend, "zeros", zeros)
    assert len(list(pipe.generate_tokens([10, 2, 3], max_new_tokens=5, stop=()))) == 5


def test_threads_run_as_one_batch(pocket_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers on four threads: most tokens come from runs of several rows."""
    pipe = ppexport.load(pocket_bundle)
    rows: list[int] = []
    run = pipe.language.run
    monkeypatch.setattr(
        pipe.language, "run", lambda *given: rows.append(given[3].ids.shape[0]) or run(*given)
    )
    ready = threading.Barrier(4)

    def ask(n: int) -> None:
        steps = pipe.generate_tokens([n, 2, 3], max_new_tokens=60, stop=())
        next(steps)
        ready.wait()
        assert len(list(steps)) == 59

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(10, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows) < 4 * 60 * 0.75


def test_batches_of_questions(pocket_bundle: Path) -> None:
    pipe = ppexport.load(pocket_bundle, reuse=0)
    screen = Path(__file__).parent.parent / "docs" / "settings.png"
    asked = [
        ppexport.Request("What is the Region?", screen),
        ppexport.Request("What is the Brightness?", [screen], prune=None, max_new_tokens=9),
        ppexport.Request("Hello", max_new_tokens=5, temperature=1.0, seed=3),
    ]
    single = [
        pipe.generate(r.prompt, r.images, r.prune, r.max_new_tokens, r.temperature, seed=r.seed).text()
        for r in asked
    ]
    assert single[:2] == ["Porto", "46%"]
    answers = pipe.generate_batch(asked)
    assert [answer.text() for answer in reversed(answers)][::-1] == single
    assert answers[1].stats.kept == answers[1].stats.total == 143
    assert answers[0].stats.kept < 143
    assert pipe.generate_batch([]) == []
    with pytest.raises(
        ppexport.RequestError, match=r"the request is 'hi', expected ppexport.Request\(\.\.\.\)"
    ):
        pipe.generate_batch(["hi"])  # type: ignore[list-item]
    with pytest.raises(ppexport.RequestError, match="max_new_tokens is 0"):
        ppexport.Request("hi", max_new_tokens=0)
    with pytest.raises(ppexport.RequestError, match="top_p is 2"):
        ppexport.Request("hi", top_p=2.0)
    dropped = pipe.generate_batch(asked)
    del dropped
    pipe.engine.step()
    assert not pipe.engine._active
    assert not pipe.engine._waiting


def test_memory_of_a_lone_request(golden_bundle: Path) -> None:
    """One slot, as many tokens as the prompt and the answer need: no more than before there were others."""
    pipe = ppexport.load(golden_bundle, reuse=0)
    steps = pipe.generate_tokens([1, 2, 3], max_new_tokens=40, stop=())
    next(steps)
    (slots,) = pipe.engine.placement.pools
    c = pipe.manifest.model.text
    assert len(slots.listed) == 1
    assert slots.nbytes == 2 * c.layers * c.kv_heads * c.head_dim * 4 * (3 + 39)
    steps.close()
    assert pipe.engine.held_bytes == 0
    assert not pipe.engine.placement.pools


def test_memory_is_bounded_over_mixed_requests(tiny_bundle: Path) -> None:
    """500 requests, up to six at once; some are cancelled. What is kept stays within its limit."""
    limit = 2 << 20
    pipe = ppexport.load(tiny_bundle, min_pixels=32 * 32, max_pixels=256 * 256, reuse=limit, together=6)
    rng = Random(0)
    numbers = np.random.default_rng(0)
    running: list[Steps] = []
    most = 0
    for _ in range(500):
        images = []
        if rng.random() < 0.5:
            images = [numbers.integers(0, 255, (32 * rng.randint(1, 6), 32 * rng.randint(1, 6), 3), np.uint8)]
        assert pipe.text is not None
        ids = pipe.text.encode(
            "What? " * rng.randint(1, 40), [image.shape[0] * image.shape[1] // 1024 for image in images]
        )
        running.append(pipe.generate_tokens(ids, images, max_new_tokens=rng.randint(1, 6), stop=()))
        if len(running) == 6:
            for steps in running[:3]:
                if rng.random() < 0.3:
                    steps.close()
            for steps in running:
                for _ in range(rng.randint(1, 6)):
                    next(steps, None)
            running = running[3:]
        assert pipe.engine.held_bytes <= limit
        most = max(most, pipe.engine.held_bytes)
        assert len(pipe.engine._active) <= 6
    assert most > limit // 2
    del steps
    running.clear()
    assert pipe.engine.held_bytes <= limit
    assert not pipe.engine._active


def test_an_interrupted_image_is_encoded_again(
    golden_bundle: Path, alone: Any, totals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in somebody's answer while another request's image is encoded: that one misses nothing."""
    pipe = ppexport.load(golden_bundle, max_pixels=E2E_PIXELS)
    first = pipe.generate_tokens([1, 2, 3], max_new_tokens=30, stop=())
    next(first)
    request = requests(totals)[1]
    second = start(pipe, request)
    encode = pipe.vision.encode
    calls = itertools.count()

    def interrupted(*given: Any) -> Any:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return encode(*given)

    monkeypatch.setattr(pipe.vision, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(first)
    (found,) = run_out(pipe, [second])
    assert len(found) == len(alone(*request))
    assert second.error is None


def test_memory_that_runs_out_for_one_leaves_the_others_alone(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for a further slot beside those that run: the newcomer gets memory of its own."""
    pipe = ppexport.load(golden_bundle)
    expected = [step.token for step in pipe.generate_tokens([1, 2, 3], max_new_tokens=20, stop=())]
    pipe.engine.forget()
    first = pipe.generate_tokens([1, 2, 3], max_new_tokens=20, stop=())
    tokens = [next(first).token]
    zeros = pipe.backend.zeros

    def full(shape: tuple[int, ...], dtype: str) -> Any:
        if len(shape) == 4 and shape[0] > 1:
            raise MemoryError("full")
        return zeros(shape, dtype)

    monkeypatch.setattr(pipe.backend, "zeros", full)
    second = pipe.generate_tokens([4, 5, 6], max_new_tokens=5, stop=())
    assert len(list(second)) == 5
    assert tokens + [step.token for step in first] == expected


def test_a_closed_pipeline_says_so(pocket_bundle: Path) -> None:
    """An answer that was cut off is never taken for one that ended."""
    pipe = ppexport.load(pocket_bundle)
    screen = Path(__file__).parent.parent / "docs" / "settings.png"
    answers = pipe.generate_batch([ppexport.Request("What is the Region?", screen)] * 2)
    next(answers[0])
    pipe.close()
    for answer in answers * 2:
        with pytest.raises(ppexport.BackendError, match="the pipeline is closed"):
            answer.text()
    with pytest.raises(ppexport.BackendError, match="the pipeline is closed"):
        pipe.generate("What is this?").text()


@pytest.mark.parametrize("requests", [None, 5, "hi", ppexport.Request("hi")])
def test_what_is_no_batch(pocket_bundle: Path, requests: Any) -> None:
    with pytest.raises(ppexport.RequestError, match="expected a list of ppexport.Request"):
        ppexport.load(pocket_bundle).generate_batch(requests)


def test_token_ids_are_checked_before_they_are_cut_to_32_bits(pocket_bundle: Path) -> None:
    pipe = ppexport.load(pocket_bundle)
    with pytest.raises(ppexport.RequestError, match="input_ids holds 3 ... 4294967301, expected 0 ... "):
        pipe.generate_tokens([2**32 + 5, 3])
    for stop in (5, [[1]], "ab"):
        with pytest.raises(ppexport.RequestError, match="stop is .* expected a list of token ids"):
            pipe.generate_tokens([1, 2], stop=stop)  # type: ignore[arg-type]


def test_who_needs_the_engine_between_steps_does_not_wait_for_the_end(pocket_bundle: Path) -> None:
    """A thread that steps again and again lets others have their turn."""
    with ppexport.load(pocket_bundle) as pipe:
        schema = {"type": "string", "minLength": 2500}
        answer = pipe.generate("Go on.", schema=schema, max_new_tokens=1500)
        first = next(answer)

        def read() -> None:
            with contextlib.suppress(ppexport.BackendError):  # the engine is closed before it has ended
                answer.text()

        thread = threading.Thread(target=read)
        thread.start()
        for _ in range(3):
            pipe.information(IMAGES / "gui_mousepad.png")
        assert answer.stats.finish == ""
        assert first
        pipe.engine.close()
        thread.join()
