"""What past requests computed is used again, and never changes an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import E2E_PIXELS, IMAGES
from PIL import Image
from terminal import runner

import ppexport
from ppexport.cli import main
from ppexport.runtime import placement
from ppexport.runtime.reuse import digest, shared

IMAGE = 500
PICTURES = [IMAGES / "web_gnuplot.png", IMAGES / "gui_mousepad.png"]


@pytest.fixture(scope="module", params=["golden", "golden-plain"])
def bundle(request: pytest.FixtureRequest, bundle_of: Callable[[str], Path]) -> Path:
    return bundle_of(request.param)


@pytest.fixture
def pipe(bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(bundle, max_pixels=E2E_PIXELS)


@pytest.fixture(scope="module")
def fresh(bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(bundle, max_pixels=E2E_PIXELS, reuse=0)


def ask(
    pipe: ppexport.Pipeline,
    ids: list[int],
    images: list[Path],
    count: int = 6,
    prune: ppexport.PixelPrune | None = None,
) -> tuple[list[int], np.ndarray, ppexport.Stats]:
    stats = ppexport.Stats()
    steps = list(pipe.generate_tokens(ids, images, prune, max_new_tokens=count, stats=stats, stop=()))
    return [step.token for step in steps], np.stack([step.logits for step in steps]), stats


def check(
    pipe: ppexport.Pipeline, fresh: ppexport.Pipeline, *request: object
) -> tuple[list[int], ppexport.Stats]:
    """Both give the same tokens from nearly the same logits."""
    (found, logits, stats), (expected, expected_logits, _) = ask(pipe, *request), ask(fresh, *request)  # type: ignore[arg-type]
    assert found == expected
    np.testing.assert_allclose(logits, expected_logits, atol=2e-5 * np.abs(expected_logits).max())
    return found, stats


@pytest.mark.parametrize("prune", [None, ppexport.PixelPrune()])
def test_a_conversation_equals_fresh_runs(
    pipe: ppexport.Pipeline,
    fresh: ppexport.Pipeline,
    prune: ppexport.PixelPrune | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three turns, the second brings another image; each runs its own tokens and images only."""
    seen = []
    encode = pipe.vision.encode
    monkeypatch.setattr(pipe.vision, "encode", lambda *given: seen.append(given) or encode(*given))
    totals = [ppexport.select(picture, max_pixels=E2E_PIXELS).total for picture in PICTURES]
    ids = [1, *[IMAGE] * totals[0], 2, 7]
    answer, stats = check(pipe, fresh, ids, PICTURES[:1], 6, prune)
    assert (stats.reused_tokens, len(seen)) == (0, 1)
    before = stats.prompt_tokens
    ids += [*answer, 11, *[IMAGE] * totals[1], 12, 13]
    answer, stats = check(pipe, fresh, ids, PICTURES, 6, prune)
    assert stats.reused_tokens == before + 5  # the last token of an answer was never run
    assert len(seen) == 2
    before = stats.prompt_tokens
    answer, stats = check(pipe, fresh, [*ids, *answer, 14, 15], PICTURES, 6, prune)
    assert stats.reused_tokens == before + 5
    assert len(seen) == 2


def test_a_second_question_about_the_same_image(pipe: ppexport.Pipeline, fresh: ppexport.Pipeline) -> None:
    picture = PICTURES[0]
    total = ppexport.select(picture, max_pixels=E2E_PIXELS).total
    image = [1, *[IMAGE] * total]
    check(pipe, fresh, [*image, 2, 7], [picture])
    _, stats = check(pipe, fresh, [*image, 3, 8, 9], [picture])
    assert stats.reused_tokens == len(image)
    _, stats = check(pipe, fresh, [*image, 3, 8, 9], [picture])
    assert stats.reused_tokens == len(image) + 2  # one token is left to run
    _, stats = check(pipe, fresh, [*image, 3], [picture], 6, ppexport.PixelPrune())
    assert stats.reused_tokens == 0  # other tokens are kept
    _, stats = check(pipe, fresh, image, [picture])
    assert stats.reused_tokens == 0  # nothing is left behind the image, which is not split
    shifted = np.roll(np.asarray(Image.open(picture).convert("RGB")), 1, axis=1)
    _, stats = check(pipe, fresh, [*image, 3, 8, 9], [shifted])
    assert stats.reused_tokens == 0


def test_features_are_kept_where_the_text_comes_first(
    pipe: ppexport.Pipeline, fresh: ppexport.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = ppexport.select(PICTURES[0], max_pixels=E2E_PIXELS).total
    check(pipe, fresh, [1, 2, *[IMAGE] * total, 3], PICTURES[:1])
    monkeypatch.setattr(pipe.vision, "encode", None)
    _, stats = check(pipe, fresh, [4, 5, *[IMAGE] * total, 3], PICTURES[:1])
    assert stats.reused_tokens == 0


def test_sequences_that_fit_little_are_left_to_others(
    pipe: ppexport.Pipeline, fresh: ppexport.Pipeline
) -> None:
    """Two images by turns, behind the same system prompt."""
    system = [40, 41, 42, 43]
    totals = [ppexport.select(picture, max_pixels=E2E_PIXELS).total for picture in PICTURES]
    for question in (5, 6, 7):
        for picture, total in zip(PICTURES, totals, strict=True):
            _, stats = check(pipe, fresh, [*system, *[IMAGE] * total, question, 8], [picture])
            assert stats.reused_tokens == (0 if question == 5 else len(system) + total)


def test_threads_with_one_image(pipe: ppexport.Pipeline, fresh: ppexport.Pipeline) -> None:
    """A sequence serves one request at a time."""
    total = ppexport.select(PICTURES[0], max_pixels=E2E_PIXELS).total
    requests = [[1, *[IMAGE] * total, n, 7] for n in range(2, 6)]
    expected = [ask(fresh, ids, PICTURES[:1])[0] for ids in requests]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: ask(pipe, ids, PICTURES[:1])[0], requests * 3))
    assert found == expected * 3


def test_abandoned_answers_are_kept(pipe: ppexport.Pipeline, fresh: ppexport.Pipeline) -> None:
    steps = pipe.generate_tokens([1, 2, 3, 4], max_new_tokens=8)
    tokens = [next(steps).token for _ in range(3)]
    steps.close()  # type: ignore[attr-defined]
    _, stats = check(pipe, fresh, [1, 2, 3, 4, *tokens, 5], [])
    assert stats.reused_tokens == 6


def test_caches_grow(golden_bundle: Path, fresh: ppexport.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving the entries changes nothing; memory follows what is used, not what could be asked for."""
    expected, logits, _ = ask(fresh, [1, 2, 3], [], 40)
    monkeypatch.setattr(placement, "ROOM", 8)
    small = ppexport.load(golden_bundle, max_pixels=E2E_PIXELS)
    found, small_logits, _ = ask(small, [1, 2, 3], [], 40)
    assert found == expected
    np.testing.assert_allclose(small_logits, logits, atol=2e-5 * np.abs(logits).max())
    assert small.reuse is not None
    kept = small.engine.held_bytes
    (slots,) = small.engine.placement.pools
    (slot,) = slots.listed
    assert slots.nbytes == kept
    assert slot.length == 42
    assert slot.length <= slots.capacity < 2 * 42
    c = small.manifest.model.text
    assert slots.nbytes == 2 * c.layers * c.kv_heads * c.head_dim * 4 * slots.capacity


def test_a_failed_growth_is_not_kept(
    golden_bundle: Path, fresh: ppexport.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some caches of a sequence may have grown by then, others not."""
    monkeypatch.setattr(placement, "ROOM", 4)
    pipe = ppexport.load(golden_bundle, max_pixels=E2E_PIXELS)
    steps = pipe.generate_tokens([1, 2, 3], max_new_tokens=40)
    assert next(steps).token >= 0
    zeros = pipe.backend.zeros
    monkeypatch.setattr(pipe.backend, "zeros", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        list(steps)
    monkeypatch.setattr(pipe.backend, "zeros", zeros)
    _, stats = check(pipe, fresh, [1, 2, 3, 4], [])
    assert stats.reused_tokens == 0


def test_a_dropped_answer_never_waits(pipe: ppexport.Pipeline) -> None:
    """The garbage collector may end a generator in the middle of anything, also while the lock is held."""
    assert pipe.reuse is not None
    steps = pipe.generate_tokens([1, 2, 3, 4], max_new_tokens=8)
    next(steps)
    with pipe.engine.lock:
        steps.close()  # type: ignore[attr-defined]
    assert pipe.engine.held_bytes > 0


def test_what_is_too_large_drives_nothing_out(golden_bundle: Path) -> None:
    pipe = ppexport.load(golden_bundle, max_pixels=E2E_PIXELS, reuse=1 << 20)
    assert pipe.reuse is not None
    ask(pipe, [1, 2, 3, 4], [], 2)
    kept = pipe.engine.held_bytes
    ask(pipe, [9] * 2000, [])
    assert pipe.engine.held_bytes == kept > 0
    assert ask(pipe, [1, 2, 3, 4, 5], [])[2].reused_tokens == 4


def test_a_closed_pipeline_keeps_nothing(golden_bundle: Path) -> None:
    with ppexport.load(golden_bundle) as pipe:
        steps = pipe.generate_tokens([1, 2, 3, 4], max_new_tokens=8)
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert pipe.reuse is not None
    assert pipe.engine.held_bytes == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads the memory of a process as Linux tells it"
)
def test_memory_is_bounded(tiny_bundle: Path) -> None:
    """500 requests of many lengths about many images: what is kept stays within the limit, the process does, too."""
    limit = 1 << 20
    pipe = ppexport.load(tiny_bundle, min_pixels=32 * 32, max_pixels=256 * 256, reuse=limit)
    assert pipe.reuse is not None
    rng = np.random.default_rng(0)
    most = settled = 0
    for i in range(500):
        picture = rng.integers(0, 255, (32 * rng.integers(1, 6), 32 * rng.integers(1, 6), 3), np.uint8)
        text = "What is this? " * int(rng.integers(1, 30))
        pipe.generate(text, [picture], max_new_tokens=int(rng.integers(1, 5))).text()
        assert pipe.engine.held_bytes <= limit
        most = max(most, pipe.engine.held_bytes)
        if i == 150:
            settled = resident()
    assert most > limit // 2
    assert resident() - settled < 8 << 20


def test_nothing_is_reused_when_off(golden_bundle: Path) -> None:
    pipe = ppexport.load(golden_bundle, reuse=0)
    assert pipe.reuse is None
    for _ in range(2):
        assert ask(pipe, [1, 2, 3, 4], [])[2].reused_tokens == 0
    with pytest.raises(ppexport.RequestError, match="reuse is -1, expected"):
        ppexport.load(golden_bundle, reuse=-1)


def columns(ids: list[int], image_of: list[int]) -> np.ndarray:
    S = len(ids)
    return np.stack([ids, image_of, *[range(S)] * 3]).astype(np.int32)


@pytest.mark.parametrize(
    ("ids", "image_of", "digests", "expected"),
    [
        ([1, 9, 9, 2, 3, 4], [-1, 0, 0, -1, -1, -1], (b"a",), 5),  # longer than what is held
        ([1, 9, 9, 2, 3], [-1, 0, 0, -1, -1], (b"a",), 4),  # the same: one token is left
        ([1, 9, 9, 2, 7], [-1, 0, 0, -1, -1], (b"a",), 4),
        ([1, 9, 9, 7, 3], [-1, 0, 0, -1, -1], (b"a",), 3),
        ([1, 9, 9, 2, 3], [-1, 0, 0, -1, -1], (b"b",), 1),  # another image
        ([1, 9, 9], [-1, 0, 0], (b"a",), 1),  # not within an image
        ([1, 9, 9, 9, 3], [-1, 0, 0, 0, -1], (b"b",), 1),
        ([1, 9, 9, 2, 3], [-1, -1, -1, -1, -1], (), 1),  # placeholders that were generated are text
        ([2], [-1], (), 0),
    ],
)
def test_what_is_shared(
    ids: list[int], image_of: list[int], digests: tuple[bytes, ...], expected: int
) -> None:
    held = columns([1, 9, 9, 2, 3], [-1, 0, 0, -1, -1])
    assert shared(held, (b"a",), columns(ids, image_of), digests) == expected


def test_positions_count_too() -> None:
    held = columns([1, 2, 3], [-1] * 3)
    other = held.copy()
    other[3, 1] = 7
    assert shared(held, (), other, ()) == 1


def test_digests_tell_images_and_selections_apart() -> None:
    image, keep = np.zeros((32, 64, 3), np.uint8), np.array([0], np.int32)
    assert digest([image], [keep]) == digest([image.copy()], [keep.copy()])
    others = {
        digest([image + 1], [keep]),
        digest([image.reshape(64, 32, 3)], [keep]),
        digest([image], [keep + 1]),
    }
    assert len(others | {digest([image], [keep])}) == 4


def test_further_questions_on_the_command_line(tiny_bundle: Path) -> None:
    """The second one runs only what is new; --no-reuse runs all of it, and answers alike."""
    picture = str(IMAGES / "web_gnuplot.png")
    command = [
        "run",
        str(tiny_bundle),
        "-i",
        picture,
        "-n",
        "4",
        "--json",
        "What is this?",
        "What is that, then?",
    ]
    found, anew = (
        [json.loads(line) for line in runner().invoke(main, [*command, *more]).stdout.splitlines()]
        for more in ([], ["--no-reuse"])
    )
    assert [row["answer"] for row in found] == [row["answer"] for row in anew]
    assert (
        found[0]["reused_tokens"]
        == 0
        < found[0]["kept"]
        < found[1]["reused_tokens"]
        < found[1]["prompt_tokens"]
    )
    assert [row["reused_tokens"] for row in anew] == [0, 0]
    result = runner().invoke(main, [part for part in command if part != "--json"])
    assert f"{found[1]['reused_tokens']} reused)" in result.stderr
