"""A further family is one file: the made-up one (made_up.py) runs end to end, pruned, reused and in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
import torch
from conftest import usual_and_slow
from invariants import relative_error

import ppexport
from ppexport.build_bundle import build
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.exporters.decoders import DECODERS
from ppexport.exporters.random_checkpoint import random_config, write_random
from ppexport.exporters.run_model import Asked, EagerModel, Look
from ppexport.models.errors import CheckpointError
from ppexport.models.families import FAMILIES
from ppexport.models.family import Family
from ppexport.verify import verify

IMAGE = made_up.PLACEHOLDER


@pytest.fixture(scope="module")
def family() -> Iterator[Family]:
    """Registered as a file of models/ and one of exporters/decoders would be."""
    made = made_up.MadeUp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, made.model_type, made)
        patch.setitem(DECODERS, "mixing", made_up.decoder())
        yield made


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made_up") / "checkpoint"
    config: dict[str, Any] = random_config("qwen3_vl", "tiny", "float32")
    config["model_type"] = family.model_type
    write_random(config, directory)
    return directory


@pytest.fixture(scope="module", params=usual_and_slow(["ort"], ["plain"]))
def bundle(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build(checkpoint, tmp_path_factory.mktemp(request.param) / "bundle", dialect=request.param)


@pytest.fixture
def pipe(bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(bundle, min_pixels=32 * 32, max_pixels=256 * 256)


def run(
    pipe: ppexport.Pipeline, ids: list[int], images: list[np.ndarray], count: int = 6
) -> tuple[Any, Any, Any]:
    stats = ppexport.Stats()
    steps = list(pipe.generate_tokens(ids, images, max_new_tokens=count, stats=stats, stop=()))
    return [step.token for step in steps], np.stack([step.logits for step in steps]), stats


def test_the_graph_is_the_model(pipe: ppexport.Pipeline, checkpoint: Path, screen: np.ndarray) -> None:
    """Against the same model in torch, token for token, with a pruned image in the prompt."""
    opened = Checkpoint.open(checkpoint)
    reference = EagerModel(opened, pipe.manifest.preprocessing, "reference")
    ids = [5, *[IMAGE] * 20, 7, 8]
    tokens, logits, stats = run(pipe, ids, [screen])
    (selection,) = stats.images
    assert stats.kept < 20
    prompt = opened.family.layout(opened.config, np.array(ids), [selection.as_kept()])
    assert prompt.positions.shape == (2, stats.prompt_tokens)
    frames, shown = pipe.pixels(screen)
    (seen,) = reference.seen([Look(frames[0], shown.views[0], selection.keep)])
    features = seen["features"]
    after = prompt.next_position + np.arange(len(tokens) - 1)
    whole = np.concatenate([prompt.ids, tokens[:-1]]).astype(np.int32)
    rows = np.concatenate([prompt.feature_rows, np.full(len(after), -1)]).astype(np.int32)
    positions = np.concatenate([prompt.positions, np.stack([after, after])], axis=1).astype(np.int32)
    expected = reference.logits(Asked(whole, rows, positions, features), len(tokens))
    assert expected.argmax(1).tolist() == tokens
    assert relative_error(logits, expected) < 1e-4


def test_what_mixes_tokens_matters(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    with torch.no_grad():
        mix = opened.read(opened.family.weights(opened.config)["language"]["mix"])
    assert float(mix.abs().max()) > 0.01


def test_together_and_again(pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    """In batches with an idle slot between, and in a second turn: the state that is no cache is that of each alone."""
    questions = [[3, 4, 5], [6, *[IMAGE] * 20, 7], [8, 9]]
    lengths = [14, 3, 12]
    images = [[], [screen], []]
    alone = [run(pipe, ids, shown, n)[:2] for ids, shown, n in zip(questions, images, lengths, strict=True)]
    pipe.engine.forget()
    sequences = []
    for ids, shown, n in zip(questions, images, lengths, strict=True):
        sequences.append(pipe.prepare_tokens(ids, shown, max_new_tokens=n, stop=(), ahead=None))
        pipe.engine.add(sequences[-1])
    while not all(sequence.finished for sequence in sequences):
        pipe.engine.step()
    for sequence, (tokens, logits) in zip(sequences, alone, strict=True):
        assert [step.token for step in sequence.pending] == tokens
        assert relative_error(np.stack([step.logits for step in sequence.pending]), logits) < 1e-5
    again = [*questions[1], *alone[1][0], 11]
    expected = run(pipe, again, [screen])
    assert expected[2].reused_tokens == len(questions[1]) - 20 + expected[2].kept + len(alone[1][0]) - 1
    pipe.engine.forget()
    fresh = run(pipe, again, [screen])
    assert fresh[2].reused_tokens == 0
    assert expected[0] == fresh[0]
    assert relative_error(expected[1], fresh[1]) < 1e-5


def test_a_state_that_cannot_be_cut_back_is_not(pipe: ppexport.Pipeline) -> None:
    """A prompt that leaves the sequence before its end starts anew; with caches alone, three tokens would be shared."""
    first = run(pipe, [3, 4, 5, 6], [], 2)
    assert run(pipe, [3, 4, 5, 7], [], 2)[2].reused_tokens == 0
    assert run(pipe, [3, 4, 5, 6, first[0][0], 9], [], 2)[2].reused_tokens == 5


def test_verify_and_estimates_know_the_state(bundle: Path, checkpoint: Path) -> None:
    report = verify(bundle, checkpoint, [], tokens=8)
    assert report.agreement == 1.0
    assert report.deepstack is None or report.deepstack.bad == 0
    states = json.loads((bundle / "bundle.json").read_text())["model"]["states"]
    assert states[-1] == {"name": "last", "shape": ["slots", 64], "dtype": "compute", "rewindable": False}


def test_the_weights_are_checked(checkpoint: Path, tmp_path: Path, family: Family) -> None:
    config = random_config("qwen3_vl", "tiny", "float32")
    write_random(config, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": family.model_type}))
    with pytest.raises(CheckpointError, match=r"model\.language_model\.mix"):
        Checkpoint.open(tmp_path / "other")
