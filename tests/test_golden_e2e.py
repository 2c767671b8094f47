"""End to end against what the authors' reference computes on real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import E2E_PIXELS, GOLDEN, IMAGES
from invariants import relative_error

import ppexport

NAMES = {"one": ["web_gnuplot.png"], "two": ["web_gnuplot.png", "gui_mousepad.png"]}
CASES = ["one_full", "one_tau0", "two_full", "two_tau0"]


@pytest.fixture(scope="module", params=["golden", "golden-plain"])
def golden_pipe(request: pytest.FixtureRequest, bundle_of: Callable[[str], Path]) -> ppexport.Pipeline:
    """The golden checkpoint in each dialect that ONNX Runtime runs."""
    return ppexport.load(bundle_of(request.param), max_pixels=E2E_PIXELS, reuse=0)


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits(golden_pipe: ppexport.Pipeline, case: str) -> None:
    golden = np.load(GOLDEN / "e2e" / f"{case}.npz")
    prune = None if case.endswith("full") else ppexport.PixelPrune(tau=0.0)
    images = [IMAGES / name for name in NAMES[case[:3]]]
    stats = ppexport.Stats()
    steps = list(
        golden_pipe.generate_tokens(golden["input_ids"], images, prune, max_new_tokens=12, stats=stats)
    )
    assert [step.token for step in steps] == golden["generated"].tolist()
    assert relative_error(np.stack([step.logits for step in steps]), golden["step_logits"]) < 1e-3
    assert relative_error(steps[0].logits, golden["last_logits"]) < 1e-3
    assert stats.generated_tokens == 12
    assert stats.finish == "length"
    assert stats.prompt_tokens_full == len(golden["input_ids"])
    assert stats.prompt_tokens_full - stats.prompt_tokens == stats.total - stats.kept


@pytest.mark.parametrize("case", CASES)
def test_keep_embeds_and_deepstack(golden_pipe: ppexport.Pipeline, case: str) -> None:
    golden = np.load(GOLDEN / "e2e" / f"{case}.npz")
    prune = None if case.endswith("full") else ppexport.PixelPrune(tau=0.0)
    encoded = [golden_pipe.encode(IMAGES / name, prune) for name in NAMES[case[:3]]]
    for i, image in enumerate(encoded):
        _, h, w = golden["grid_thw"][i]
        assert (image.selection.rows, image.selection.cols) == (h // 2, w // 2)
        if prune is not None:
            np.testing.assert_array_equal(image.keep, golden[f"keep_{i}"])
    embeds = np.concatenate([image.embeds for image in encoded])
    deepstack = np.concatenate([image.deepstack for image in encoded], axis=1)
    assert relative_error(embeds, golden["image_embeds"]) < 1e-4
    assert relative_error(deepstack, golden["deepstack"]) < 1e-4


def test_two_images_in_one_request_equal_each_alone(golden_pipe: ppexport.Pipeline) -> None:
    """The features of all images of a prompt lie side by side."""
    images = [IMAGES / name for name in NAMES["two"]]
    ids = [1, *[500] * sum(ppexport.select(image, max_pixels=E2E_PIXELS).total for image in images), 2]
    sequence = golden_pipe.prepare_tokens(ids, images, ppexport.PixelPrune())
    features = [golden_pipe.engine.features(picture) for picture in sequence.pictures]
    together = golden_pipe.backend.download(golden_pipe.vision.join(features))
    alone = [golden_pipe.encode(image, ppexport.PixelPrune()) for image in images]
    np.testing.assert_array_equal(together[0], np.concatenate([e.embeds for e in alone]))
    np.testing.assert_array_equal(together[1:], np.concatenate([e.deepstack for e in alone], axis=1))


def test_keep_all_equals_unpruned(golden_pipe: ppexport.Pipeline) -> None:
    """On an image with nothing to drop, pruning changes nothing at all."""
    noise = np.random.default_rng(5).integers(0, 255, (256, 320, 3), np.uint8)
    pruned, full = (golden_pipe.encode(noise, prune) for prune in (ppexport.PixelPrune(), None))
    assert pruned.selection.kept == pruned.selection.total
    np.testing.assert_array_equal(pruned.embeds, full.embeds)
    np.testing.assert_array_equal(pruned.deepstack, full.deepstack)


def test_pruning_that_saves_nothing_is_left_out(golden_pipe: ppexport.Pipeline) -> None:
    """One repetition among 80 tokens: the request runs as if pruning were off, and says so; two are worth it."""
    noise = np.random.default_rng(5).integers(0, 255, (256, 320, 3), np.uint8)
    noise[:32, 32:64] = noise[:32, :32]
    found = golden_pipe.encode(noise, ppexport.PixelPrune())
    assert found.selection.kept == 80
    assert found.selection.reason == "only 1 of 80 tokens could be dropped, which saves nothing"
    np.testing.assert_array_equal(found.embeds, golden_pipe.encode(noise, None).embeds)
    noise[64:96, 32:64] = noise[64:96, :32]
    assert golden_pipe.encode(noise, ppexport.PixelPrune()).selection.kept == 78
    assert ppexport.select(noise).kept == 78
