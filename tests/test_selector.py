"""Prune and select: settings, budgets, frames, baselines."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from invariants import check_selection
from prune_spec import distance, frame, select, token

import ppexport
from ppexport.models.pruners.pixelprune import PREDICTORS, PRUNE_METRICS
from ppexport.runtime.selector import HIGHEST, LEVELS, packaged_selector


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
        (
            {"method": "best"},
            "method is 'best', expected one of: pred_2d, raster, serpentine, unique, conncomp, random",
        ),
        (
            {"method": "unique", "tau": 0.1},
            "method 'unique' has metric 'max', tau 0.1 and anchored True, expected",
        ),
        (
            {"method": "unique", "anchored": False},
            "method 'unique' has metric 'max', tau 0 and anchored False",
        ),
        ({"method": np.array(["raster", "raster"])}, "method is array"),
        ({"metric": "ssim"}, "metric is 'ssim', expected one of: max, mae, rmse"),
        ({"anchored": 1}, "anchored is 1, expected True or False"),
        ({"seed": -1}, "seed is -1, expected 0 to 2147483646"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, expected a whole number of at least 1"),
        (
            {"method": "unique", "max_tokens": 9},
            "max_tokens goes with pred_2d, raster, serpentine, found method 'unique'",
        ),
    ],
)
def test_impossible_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message.replace("(", r"\(")):
        ppexport.PixelPrune(**arguments)


def test_random_keeps_as_many_as_pred_2d(screen: np.ndarray) -> None:
    count = ppexport.select(screen, min_pixels=1).kept
    found = [ppexport.select(screen, ppexport.PixelPrune("random", seed=s), min_pixels=1) for s in (0, 0, 1)]
    for selection in found:
        check_selection(selection)
        assert selection.kept == count
    np.testing.assert_array_equal(found[0].keep, found[1].keep)
    assert found[0].keep.tolist() != found[2].keep.tolist()


def test_unknown_block_size(screen: np.ndarray) -> None:
    with pytest.raises(ppexport.RequestError, match="patch \\* merge is 60, expected one of: 14, 28, 32"):
        ppexport.select(screen, patch=20, merge=3)


def test_thresholds_are_whole_numbers_at_every_level() -> None:
    """tau = k / 255 is exactly k for max, k times the bytes of a token for mae, and so on: no rounding down."""
    for k in range(256):
        for metric, expected in (("max", k), ("mae", k * 3072), ("rmse", k * k * 3072)):
            assert ppexport.PixelPrune(metric=metric, tau=k / 255).threshold(32) == expected


def test_prune_is_frozen() -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        ppexport.PixelPrune().tau = 0.5  # type: ignore[misc]


def test_components_keep_about_as_many_as_pred_2d(screen: np.ndarray) -> None:
    big = np.tile(screen, (6, 6, 1))
    count = ppexport.select(big, min_pixels=1).kept
    found = [ppexport.select(big, ppexport.PixelPrune("conncomp", seed=s), min_pixels=1) for s in (0, 0, 1)]
    for selection in found:
        check_selection(selection)
        assert abs(selection.kept - count) < 0.1 * count
    np.testing.assert_array_equal(found[0].keep, found[1].keep)
    assert found[0].keep.tolist() != found[2].keep.tolist()


@pytest.fixture
def slope() -> np.ndarray:
    """Ten rows of ten tokens; each row's tokens differ from the one before by its row number, the first row by 0."""
    level = np.arange(10)[:, None] * np.arange(10)
    return level.repeat(32, 0).repeat(32, 1)[:, :, None].repeat(3, 2).astype(np.uint8)


@pytest.mark.parametrize("method", PREDICTORS)
@pytest.mark.parametrize("metric", PRUNE_METRICS)
@pytest.mark.parametrize("most", [4, 7, 30, 60, 100])
def test_a_budget_finds_the_smallest_tau(slope: np.ndarray, method: str, metric: str, most: int) -> None:
    selection = ppexport.select(slope, ppexport.PixelPrune(method, metric, max_tokens=most), min_pixels=1)
    check_selection(selection)
    assert selection.kept <= most
    assert selection.reason == ""
    assert selection.prune is not None
    at = ppexport.select(slope, ppexport.PixelPrune(method, metric, selection.prune.tau), min_pixels=1)
    np.testing.assert_array_equal(at.keep, selection.keep)
    if selection.prune.tau:
        below = ppexport.PixelPrune(method, metric, selection.prune.tau - 1 / LEVELS[metric])
        assert ppexport.select(slope, below, min_pixels=1).kept > most


def test_a_budget_composes_with_tau(slope: np.ndarray) -> None:
    """tau is where the search begins, and all there is to it if that already fits."""
    free = ppexport.select(slope, ppexport.PixelPrune(tau=0.02), min_pixels=1)
    for most in (free.kept, free.kept + 5, 1000):
        found = ppexport.select(slope, ppexport.PixelPrune(tau=0.02, max_tokens=most), min_pixels=1)
        np.testing.assert_array_equal(found.keep, free.keep)
        assert found.prune is not None
        assert found.prune.tau == 0.02
    off = packaged_selector(32)
    _, kept = off.select(off.backend.upload(slope), ppexport.PixelPrune(max_tokens=99), worth=0.5)
    assert kept.kept <= 99  # a budget is a promise, even where pruning saves little
    less = ppexport.select(slope, ppexport.PixelPrune(tau=0.02, max_tokens=free.kept - 1), min_pixels=1)
    assert less.kept < free.kept
    assert less.prune is not None
    assert less.prune.tau > 0.02


def test_a_budget_that_no_tau_meets_keeps_what_surprises_most() -> None:
    noise = np.random.default_rng(3).integers(0, 256, (320, 320, 3), np.uint8)
    noise[64:96, 64:96] = 0  # one token that lies farther from its left neighbour than noise from noise
    noise[64:96, 32:64] = 255
    selection = ppexport.select(noise, ppexport.PixelPrune(metric="mae", max_tokens=9), min_pixels=1)
    check_selection(selection)
    assert selection.kept == 9
    expected = (
        "tau 0.25 would keep 100 tokens, expected at most 9; kept are the 9 that differ most from their "
    )
    assert selection.reason == expected + "prediction"
    left = [
        distance("mae", token(noise, 32, i), token(noise, 32, i - 1 if i % 10 else i - 10))
        for i in range(1, 100)
    ]
    assert set(selection.keep.tolist()) == {0, *(1 + np.argsort(-np.array(left), kind="stable")[:8]).tolist()}
    assert {21, 22, 23} & set(selection.keep.tolist()) == {21, 22, 23}
    high = ppexport.select(noise, ppexport.PixelPrune(tau=0.5, max_tokens=3), min_pixels=1)
    assert high.kept == 3
    assert high.reason.startswith("tau 0.5 would keep 100 tokens, expected at most 3")
    assert HIGHEST == 0.25


def recording(count: int = 5) -> list[np.ndarray]:
    """A cursor that moves over a document, and light that changes slowly."""
    page = np.full((160, 192, 3), 240, np.uint8)
    page[64:96, 40:140] = np.random.default_rng(1).integers(60, 200, (32, 100, 3), np.uint8)
    made = []
    for i in range(count):
        picture = page - np.uint8(i)
        picture[10:20, 20 + 40 * i : 26 + 40 * i] = 0
        made.append(picture)
    return made


@pytest.mark.parametrize("metric", PRUNE_METRICS)
@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize("anchored", [True, False])
def test_frames_follow_each_other(metric: str, level: int, anchored: bool) -> None:
    frames, prune = recording(), ppexport.PixelPrune("pred_2d", metric, level / 255, anchored)
    threshold, shown = prune.threshold(32), None
    found = list(ppexport.select_frames(frames, prune, min_pixels=1))
    assert len(found) == len(frames)
    np.testing.assert_array_equal(found[0].keep, ppexport.select(frames[0], prune, min_pixels=1).keep)
    for image, selection in zip(frames, found, strict=True):
        kept, shown = frame(image, shown, 32, metric, threshold, anchored)
        assert selection.keep.tolist() == kept


def test_a_change_is_noticed_when_it_adds_up() -> None:
    """Anchored: although every frame is within tau of the one before."""
    frames = recording(40)
    kept = [s.kept for s in ppexport.select_frames(frames, ppexport.PixelPrune(tau=3 / 255), min_pixels=1)]
    assert kept[8:] == [6, 1, 0, 0] * 8  # once the light has changed by 4 since a token was last taken
    sliding = ppexport.select_frames(frames, ppexport.PixelPrune(tau=3 / 255, anchored=False), min_pixels=1)
    assert [s.kept for s in sliding][5:] == [0] * 35


def test_a_dropped_token_never_stands_for_another_that_was_dropped_before_it() -> None:
    """Errors of time and space do not add up: 200 cannot become 50 in three frames of which little is kept."""
    levels = ([100, 90, 200, 200], [100, 80, 70, 200], [100, 80, 60, 50])
    frames = [
        np.repeat(np.array(row, np.uint8), 32)[None, :, None].repeat(32, 0).repeat(3, 2) for row in levels
    ]
    found = [
        s.keep.tolist()
        for s in ppexport.select_frames(frames, ppexport.PixelPrune(tau=10 / 255), min_pixels=1)
    ]
    assert found == [[0, 2], [1], [2]]


def test_frames_are_taken_one_by_one() -> None:
    taken = []

    def camera() -> Iterator[np.ndarray]:
        for i, picture in enumerate(recording()):
            taken.append(i)
            yield picture

    found = ppexport.select_frames(camera(), min_pixels=1)
    assert taken == []
    next(found)
    assert taken == [0]


def test_impossible_frames(screen: np.ndarray) -> None:
    with pytest.raises(
        ppexport.RequestError, match="frame 2 has 160 x 96 pixels after resizing, expected 160 x 128"
    ):
        list(ppexport.select_frames([screen, screen[:96]], min_pixels=1))
    with pytest.raises(ppexport.RequestError, match="frames is a str, expected a list of images"):
        ppexport.select_frames("film.mp4")
    for prune, found in (
        (ppexport.PixelPrune("random"), "method 'random'"),
        (ppexport.PixelPrune(max_tokens=3), "max_tokens 3"),
    ):
        with pytest.raises(
            ppexport.RequestError, match=f"predicted by pred_2d with a fixed tau, found {found}"
        ):
            ppexport.select_frames([screen], prune)
    with pytest.raises(ppexport.RequestError, match="min_pixels is 9 and max_pixels 8"):
        ppexport.select_frames([screen], min_pixels=9, max_pixels=8)
    assert len(list(ppexport.select_frames(np.stack([screen, screen]), min_pixels=1))) == 2
    with pytest.raises(ppexport.RequestError, match=r"prune is None, expected ppexport.PixelPrune"):
        ppexport.select_frames([screen], None)  # type: ignore[arg-type]
    assert list(ppexport.select_frames([])) == []
