"""PruneSID as it runs: what it selects against exact and stepwise references, and in bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import prunesid_spec as spec
import pytest
from conftest import GOLDEN, usual_and_slow
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from terminal import runner

import ppexport
from ppexport.cli import main
from ppexport.models.pruners import prunesid
from ppexport.models.pruners.prunesid import GROUPS
from ppexport.models.start_block import start_block
from ppexport.runtime import prune as runtime_prune
from ppexport.runtime.backends.ort import OrtCpu

SCREEN = GOLDEN.parent.parent / "docs" / "settings.png"


@pytest.mark.parametrize(("budget", "least"), usual_and_slow([(64, 0.99), (192, 0.94)], [(128, 0.99)]))
@pytest.mark.parametrize("variant", ["qwen", "llava"])
def test_components_are_those_of_an_exact_decomposition(variant: str, budget: int, least: float) -> None:
    """By what they select; and the graph selects what the same steps in numpy do, index by index."""
    overlaps = []
    for x in spec.pictures(3):
        score = np.abs(x).sum(1) ** 3 if variant == "llava" else None
        prune = ppexport.PruneSID(budget, variant=variant, order="reference")
        found = ppexport.select_tokens(x, prune, score).keep.tolist()
        exact = spec.select(variant, x, spec.exact_components(x, GROUPS), budget, score)
        overlaps.append(len(set(found) & set(exact)) / budget)
        start = start_block(x.shape[1])[:, : prune.directions]
        steps = spec.select(variant, x, spec.iterated_components(x, start, GROUPS), budget, score)
        assert found == (sorted(steps) if variant == "qwen" and budget > 150 else steps)
    assert np.mean(overlaps) >= least, overlaps


def test_every_run_and_any_number_of_threads_give_the_same() -> None:
    x = next(spec.pictures(1))
    prune = ppexport.PruneSID(100)
    first = ppexport.select_tokens(x, prune, threads=1)
    for threads in (1, 2, 3):
        again = ppexport.select_tokens(x, prune, threads=threads)
        assert again.keep.tolist() == first.keep.tolist()
        assert again.group.tolist() == first.group.tolist()
    assert (np.diff(first.keep) > 0).all()
    grouped = ppexport.select_tokens(x, ppexport.PruneSID(100, order="reference"))
    assert sorted(grouped.keep) == first.keep.tolist()
    assert (np.diff(grouped.group[grouped.keep]) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 130),
    width=st.integers(2, 40),
    budget=st.integers(1, 150),
    kind=st.sampled_from(["random", "zeros", "equal", "pairs", "huge", "tiny"]),
    variant=st.sampled_from(["qwen", "llava"]),
    order=st.sampled_from(["raster", "reference"]),
    seed=st.integers(0, 99),
)
@example(tokens=40, width=16, budget=1, kind="random", variant="qwen", order="raster", seed=0)
@example(tokens=40, width=16, budget=3, kind="random", variant="qwen", order="reference", seed=0)
@example(tokens=300, width=8, budget=4, kind="equal", variant="llava", order="raster", seed=0)
def test_any_input_gives_as_many_tokens_as_the_budget(
    tokens: int, width: int, budget: int, kind: str, variant: str, order: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    x *= {"zeros": 0, "huge": 1e4, "tiny": 1e-4}.get(kind, 1)
    if kind == "equal":
        x[:] = x[0]
    elif kind == "pairs":
        x[1::2] = x[: len(x[1::2]) * 2 : 2]
    score = np.where(rng.random(tokens) < 0.5, 1, rng.random(tokens)) if variant == "llava" else None
    found = ppexport.select_tokens(x, ppexport.PruneSID(budget, variant=variant, order=order), score)
    assert found.total == tokens
    assert len(set(found.keep.tolist())) == found.kept
    assert set(found.keep.tolist()) <= set(range(tokens))
    assert found.kept == min(budget, tokens)


def test_a_dynamic_budget_follows_how_much_a_picture_shows() -> None:
    rich = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    poor = rich * 0.2 + np.random.default_rng(1).standard_normal(64).astype(np.float32)
    fixed = ppexport.PruneSID(60)
    dynamic = ppexport.PruneSID(60, dynamic=True, information=0.5)
    assert ppexport.select_tokens(rich, fixed).kept == ppexport.select_tokens(poor, fixed).kept == 60
    for x in (rich, poor):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        similarity = ((unit @ unit.T).sum() - len(x)) / (len(x) * (len(x) - 1))
        expected = max(16, round(60 * (1 - similarity) / 0.5))
        assert (expected > 16) == (x is rich)
        assert abs(ppexport.select_tokens(x, dynamic).kept - expected) <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected 1 to 1048576"),
        ({"max_tokens": 1 << 31}, "max_tokens is 2147483648, expected 1 to 1048576"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, expected a whole number"),
        ({"variant": "clip"}, "variant is 'clip', expected one of: auto, qwen, llava"),
        ({"order": "random"}, "order is 'random', expected one of: raster, reference"),
        ({"dynamic": 1}, "dynamic is 1, expected True or False"),
        ({"information": 0}, "information is 0, expected a number over 0, up to 2"),
    ],
)
def test_settings_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        ppexport.PruneSID(**{"max_tokens": 4, **change})


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (
            np.ones((3, 4, 5)),
            {},
            r"features has dtype float64 and shape \(3, 4, 5\), expected floats \[T, C\]",
        ),
        (np.ones((0, 4)), {}, "features has dtype float64 and shape"),
        ([[1, 2], [3]], {}, r"features cannot be read as an array \(.*\), expected floats \[T, C\]"),
        (np.full((4, 4), 1e300), {}, "features holds values that are not finite in float32"),
        (np.full((4, 4), np.nan), {}, "features holds values that are not finite"),
        (np.ones((4, 4)), {"prune": ppexport.PixelPrune()}, "expected ppexport.PruneSID"),
        (np.ones((4, 4)), {"prune": ppexport.PruneSID(2, "llava")}, "variant 'llava' needs a score"),
        (np.ones((4, 4)), {"prune": ppexport.PruneSID(2, "qwen"), "score": np.ones(4)}, "takes no score"),
        (np.ones((4, 4)), {"score": np.ones(3)}, r"score has shape \(3,\), expected \[4\]"),
        (
            np.ones((prunesid.MOST_TOKENS + 1, 1)),
            {},
            "prunesid takes up to 8192 tokens of an image, found 8193",
        ),
    ],
)
def test_features_that_are_none(features: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        ppexport.select_tokens(features, **{"prune": ppexport.PruneSID(2), **options})


def test_the_packaged_graphs_say_what_they_take() -> None:
    graphs = runtime_prune.PruningGraphs(
        OrtCpu(), Path(runtime_prune.__file__).parent / "selectors" / "features"
    )
    assert "score" in graphs.session("prunesid.llava").inputs
    assert "score" not in graphs.session("prunesid.qwen").inputs


# ------------------------------------------------------------------------------------------------ in bundles


@pytest.fixture(scope="module")
def pipe(pocket_bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(pocket_bundle)


def test_features_are_kept_with_their_levels(pipe: ppexport.Pipeline) -> None:
    """Those of the whole image, as they were; and composed with PixelPrune, of what that leaves."""
    for before in ([], [ppexport.PixelPrune()]):
        full = pipe.encode(SCREEN, before or None)
        found = pipe.encode(SCREEN, [*before, ppexport.PruneSID(20)])
        assert len(found.keep) == 20
        rows = np.searchsorted(full.keep, found.keep)
        np.testing.assert_array_equal(full.keep[rows], found.keep)
        np.testing.assert_array_equal(found.features, full.features[:, rows])
        alone = ppexport.select_tokens(full.embeds, ppexport.PruneSID(20))
        assert alone.keep.tolist() == rows.tolist()


def test_order_of_the_authors(pipe: ppexport.Pipeline) -> None:
    """Tokens go to the decoder group by group, each with its position in the full grid."""
    raster = pipe.encode(SCREEN, ppexport.PruneSID(40))
    grouped = pipe.encode(SCREEN, ppexport.PruneSID(40, order="reference"))
    assert grouped.keep.tolist() != raster.keep.tolist()
    assert sorted(grouped.keep.tolist()) == raster.keep.tolist()
    at = np.argsort(grouped.keep)
    np.testing.assert_array_equal(grouped.features[:, at], raster.features)
    model = pipe.manifest.model
    ids = np.array([5, *[model.image_token] * raster.selection.total, 6], np.int32)
    prompts = [pipe.family.layout(model, ids, [each.selection.as_kept()]) for each in (raster, grouped)]
    np.testing.assert_array_equal(prompts[1].positions[:, 1:-1][:, at], prompts[0].positions[:, 1:-1])
    assert prompts[0].next_position == prompts[1].next_position
    assert pipe.generate("What is the Region?", SCREEN, ppexport.PruneSID(40, order="reference")).text()


def test_what_each_pruner_dropped_is_told(pipe: ppexport.Pipeline) -> None:
    answer = pipe.generate(
        "What is the Region?", SCREEN, [ppexport.PixelPrune(), ppexport.PruneSID(20)], max_new_tokens=2
    )
    answer.text()
    (image,) = answer.stats.images
    pixel, semantic = image.dropped
    assert (pixel.pruner, semantic.pruner) == ("pixelprune", "prunesid")
    assert pixel.tokens + semantic.tokens == image.total - 20
    (fits,) = pipe.encode(SCREEN, ppexport.PruneSID(1000)).selection.dropped
    assert (fits.tokens, fits.reason) == (0, "143 tokens, within the budget of 1000")


def test_together_is_alone_and_what_was_computed_is_found_again(pipe: ppexport.Pipeline) -> None:
    requests = [
        ppexport.Request("What is the Region?", SCREEN, ppexport.PruneSID(n), max_new_tokens=6)
        for n in (30, 60)
    ]
    alone = [pipe.generate(r.prompt, r.images, r.prune, r.max_new_tokens) for r in requests]
    said = [answer.text() for answer in alone]
    assert [answer.text() for answer in pipe.generate_batch(requests)] == said
    again = pipe.generate(requests[1].prompt, SCREEN, ppexport.PruneSID(60), max_new_tokens=6)
    assert again.text() == said[1]
    assert again.stats.reused_tokens == alone[1].stats.prompt_tokens - 1


def test_the_graph_is_loaded_ahead(pocket_bundle: Path) -> None:
    pipe = ppexport.load(pocket_bundle)
    loaded = pipe.feature_pruners.graphs._sessions
    assert loaded == {}
    pipe.load_pruners(ppexport.PixelPrune())
    assert loaded == {}
    pipe.load_pruners(ppexport.PruneSID(20))
    assert list(loaded) == ["prunesid.qwen.onnx"]


def test_a_model_without_class_token(pipe: ppexport.Pipeline) -> None:
    with pytest.raises(ppexport.RequestError, match="has no graph for the pruner prunesid.llava"):
        pipe.encode(SCREEN, ppexport.PruneSID(20, variant="llava"))


@pytest.mark.newest
def test_the_command_line(pocket_bundle: Path, tmp_path: Path) -> None:
    asked = ["run", str(pocket_bundle), "-i", str(SCREEN), "What is the Region?"]
    done = runner().invoke(main, [*asked, "--prunesid", "30"])
    assert done.exit_code == 0, done.output
    assert "kept 30 of 143 tokens" in done.stderr
    assert "prunesid dropped 18" in done.stderr
    done = runner().invoke(main, [*asked, "--prunesid", "30", "--no-prune", "--json"])
    assert done.exit_code == 0, done.output
    (image,) = json.loads(done.stdout)["images"]
    assert image["kept"] == 30
    assert [(each["pruner"], each["tokens"]) for each in image["dropped"]] == [("prunesid", 113)]
    done = runner().invoke(main, [*asked, "--prunesid", "0"])
    assert (done.exit_code, "0 is not in the range" in done.output) == (2, True)
    done = runner().invoke(
        main, ["eval", str(pocket_bundle), "--prunesid", "20", "-n", "1", "--skills", "read"]
    )
    assert done.exit_code == 0, done.output
    assert "prunesid 20" in done.output


@pytest.mark.newest
def test_inspect_with_a_bundle(pocket_bundle: Path, tmp_path: Path) -> None:
    """What the tower saw has the colours of its groups, dropped blocks the strong ones."""
    picture = tmp_path / "seen.png"
    asked = ["inspect", str(SCREEN), "--bundle", str(pocket_bundle), "--prunesid", "20"]
    done = runner().invoke(main, [*asked, "--overlay", str(picture)])
    assert done.exit_code == 0, done.output
    assert "kept    20 (14.0%)" in done.output
    assert "dropped 95 by pixelprune" in done.output
    assert "dropped 28 by prunesid" in done.output
    (told,) = json.loads(runner().invoke(main, [*asked, "--json"]).stdout)
    pipe = ppexport.load(pocket_bundle)
    selection = pipe.encode(SCREEN, [ppexport.PixelPrune(), ppexport.PruneSID(20)]).selection
    assert told["keep"] == selection.keep.tolist()
    groups = selection.groups
    assert groups is not None
    assert groups.seen.tolist() == pipe.encode(SCREEN, ppexport.PixelPrune()).keep.tolist()
    drawn = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    source = np.asarray(Image.open(SCREEN).convert("RGB")).astype(int)
    block = 32

    def change(token: int) -> float:
        row, col = divmod(token, selection.cols)
        inside = np.s_[row * block + 6 : (row + 1) * block - 6, col * block + 6 : (col + 1) * block - 6]
        return float(np.abs(drawn[inside] - source[inside]).mean())

    kept = [change(token) for token in selection.keep]
    dropped = [change(token) for token in set(groups.seen.tolist()) - set(selection.keep.tolist())]
    assert min(kept) > 1
    assert np.mean(dropped) > 2 * np.mean(kept)
    for more, message in (
        (["--frames"], "--bundle goes without --frames"),
        (["--patch", "14"], "--bundle goes without --patch"),
    ):
        done = runner().invoke(main, [*asked, *more])
        assert (done.exit_code, message in done.output) == (2, True), done.output
    done = runner().invoke(main, ["inspect", str(SCREEN), "--prunesid", "20"])
    assert (done.exit_code, "--bundle names the bundle" in done.output) == (2, True)
