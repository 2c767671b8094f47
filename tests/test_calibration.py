"""Four bits fitted to a user's images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGES
from terminal import runner
from test_precision import MODEL, POCKET, matrix

import ppexport
from ppexport.build_bundle import build
from ppexport.calibration import Calibration
from ppexport.cli import main
from ppexport.exporters.bundle import plan
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.exporters.run_model import EagerModel
from ppexport.exporters.weights.gptq import Moments, quantize_calibrated
from ppexport.exporters.weights.quantize import dequantize, quantize
from ppexport.models.precision import Wanted
from ppexport.models.pruners import Pruner
from ppexport.runtime.bundle import open_bundle
from ppexport.workloads.screens import HELD_OUT, SKILLS, sample


@pytest.mark.parametrize(("symmetric", "signed"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("size", [32, 128])
def test_calibration_lowers_the_error_of_a_product(symmetric: bool, signed: bool, size: int) -> None:
    """On inputs that go together, as those of a model do; other inputs than the ones it was fitted to."""
    mix = (
        torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
        * torch.linspace(0.05, 2, 256)[:, None]
    )
    inputs, others = (
        torch.randn(2048, 256, generator=torch.Generator().manual_seed(s)) @ mix for s in (2, 3)
    )
    weights, moments = matrix(4), inputs.t() @ inputs / len(inputs)
    plain = quantize(weights, 4, size, symmetric, signed=signed)
    fitted = quantize_calibrated(weights, 4, size, symmetric, torch.float32, signed, moments)
    errors = [(others @ (torch.from_numpy(dequantize(q)) - weights)).square().mean() for q in (plain, fitted)]
    assert errors[1] < 0.5 * errors[0]
    assert np.isfinite(fitted.scales).all()
    assert signed or fitted.scales.min() > 0  # as TensorRT wants them


def test_calibration_survives_inputs_that_are_never_there() -> None:
    """Moments of rank 1, and inputs that are always 0."""
    x = torch.zeros(1, 64)
    x[0, :8] = 1.0
    for moments in (x.t() @ x, torch.zeros(64, 64)):
        q = quantize_calibrated(matrix(5, 64, 8), 4, 32, True, torch.float32, False, moments)
        assert np.abs(dequantize(q) - matrix(5, 64, 8).numpy()).max() < 0.03


def test_moments_are_shared_and_add_up(tmp_path: Path) -> None:
    moments, a, b = Moments(tmp_path), torch.randn(3, 4), torch.randn(2, 5, 4)
    for weight in ("q", "k"):
        for x in (a, b):
            moments.add("language", weight, x)
    together = torch.cat([a, b.reshape(-1, 4)])
    found = moments.of("language", "q")
    assert found is not None
    torch.testing.assert_close(found, together.t() @ together / 13)
    moments.add("vision", "fc1", a)
    moments.add("vision", "fc2", a)  # the same inputs
    assert moments.of("vision", "fc3") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "language.k.npy",
        "language.q.npy",
        "vision.fc1.npy",
    ]


def screens(directory: Path, first: int, count: int) -> Path:
    directory.mkdir()
    for i in range(count):
        sample(SKILLS[i % len(SKILLS)], first + i).image.save(directory / f"{i}.png")
    return directory


def test_a_bundle_fitted_to_screens_is_closer_on_other_screens(tmp_path: Path) -> None:
    folder, wanted = screens(tmp_path / "mine", 0, 4), Wanted("int4", vision="int4")
    other = screens(tmp_path / "other", HELD_OUT, 4)
    build(POCKET, tmp_path / "wide", "fp32")
    build(POCKET, tmp_path / "plain", wanted)
    build(POCKET, tmp_path / "fitted", wanted, calibration=Calibration([folder, folder / "0.png"]))
    pipes = {name: ppexport.load(tmp_path / name) for name in ("wide", "plain", "fitted")}
    assert str(pipes["fitted"].manifest.precision).endswith("groups of 32, fitted to 5 images")
    errors: Counter[str] = Counter()
    for image in other.iterdir():
        expected = pipes["wide"].encode(image).embeds
        for name in ("plain", "fitted"):
            errors[name] += float(np.square(pipes[name].encode(image).embeds - expected).mean())
    assert errors["fitted"] < 0.6 * errors["plain"]
    assert not [p for p in (tmp_path / "fitted").iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("family", "prune"),
    [
        ("qwen3_vl", [ppexport.PixelPrune(), ppexport.PruneSID(12)]),
        ("llava_next", [ppexport.PruneSID(30, share="information")]),
        ("llava_next", [ppexport.PixelPrune(), ppexport.PruneSID(24, order="reference")]),
    ],
    ids=["qwen3_vl", "llava_next", "llava_next-reference"],
)
def test_images_are_pruned_as_the_bundle_does(family: str, prune: list[Pruner], tmp_path: Path) -> None:
    """What the layers are fitted to is the prompt, and are the features, that the bundle's decoder gets."""
    checkpoint = tmp_path / "checkpoint"
    write_random(random_config(family, "tiny"), checkpoint)
    write_text_files(checkpoint, family)
    image = tmp_path / "image.png"
    sample(SKILLS[0], 5).image.resize((200, 140)).save(image)
    made = plan(checkpoint, prune=lambda own: prune)
    calibration = Calibration([image], "What is it?")
    (found,) = calibration.samples(made, checkpoint)
    asked = EagerModel(made.checkpoint, made.preprocessing, "test").asked(found)
    pipe = ppexport.load(build(checkpoint, tmp_path / "bundle", prune=prune))
    sequence = pipe.prepare(ppexport.Request("What is it?", [image]))
    assert sequence.stats.kept < sequence.stats.images[0].total
    assert any(each.pruner == "prunesid" and each.tokens for each in sequence.stats.images[0].dropped)
    np.testing.assert_array_equal(asked.ids, sequence.prompt.ids)
    np.testing.assert_array_equal(asked.feature_rows, sequence.prompt.feature_rows)
    np.testing.assert_array_equal(asked.positions, sequence.prompt.positions)
    expected = pipe.backend.download(pipe.engine.features(sequence.pictures[0]))
    np.testing.assert_allclose(asked.features, expected, atol=1e-3 * np.abs(expected).max())


def test_calibration_without_a_tokenizer(tmp_path: Path) -> None:
    image = screens(tmp_path / "mine", 0, 1) / "0.png"
    path = build(MODEL, tmp_path / "bundle", "int4", calibration=Calibration([image]))
    assert open_bundle(path)[1].precision.calibrated == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", "nothing.png", "--precision", "int4"], "nothing.png: no such file"),
        (["--calibrate", ".", "--precision", "int4"], "holds no images, expected files such as .png"),
        (
            ["--calibrate", str(IMAGES), "--precision", "int8"],
            "expected int4 for the decoder's layers or the vision",
        ),
        (["--calibrate-question", "What?"], "--calibrate-question goes with --calibrate"),
    ],
)
def test_calibration_that_cannot_be(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner().invoke(main, ["build", str(POCKET), "-o", "bundle", *options])
    assert result.exit_code != 0
    assert message in result.output
    assert not list(tmp_path.iterdir())
