"""What Qwen3-VL bundles do in the other tests, bundles of the other families do as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, usual_and_slow
from terminal import runner

import ppexport
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.models import engine_record
from ppexport.models.families import FAMILIES
from ppexport.runtime.bundle import open_bundle
from ppexport.trt_build import Options
from ppexport.verify import verify

OTHERS = sorted(set(FAMILIES) - {"qwen3_vl", "qwen3_5_text"})  # the latter takes no image
SCREEN = GOLDEN.parent.parent / "docs" / "settings.png"


# those that have most of what the others have
@pytest.fixture(scope="module", params=usual_and_slow(["qwen2_5_vl", "llava_next"], OTHERS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "checkpoint"
    write_random(random_config(request.param, "tiny"), directory)
    write_text_files(directory, request.param)
    return directory


@pytest.fixture(scope="module")
def built(checkpoint: Path) -> Callable[..., Path]:
    """A bundle in a dialect and precision, built once."""

    def made(dialect: str = "ort", precision: str = "auto") -> Path:
        output = checkpoint.parent / f"{dialect}-{precision}"
        return output if output.exists() else build(checkpoint, output, precision, dialect)

    return made


@pytest.mark.parametrize("dialect", ["ort", "plain"])
def test_a_pruned_screen_in_both_dialects(built: Callable[..., Path], checkpoint: Path, dialect: str) -> None:
    """Every token is what the modules in torch say, features to 1e-4."""
    bundle = built(dialect, "fp32")
    report = verify(bundle, checkpoint, [str(SCREEN)], tokens=12)
    assert report.agreement == 1.0
    assert report.embeds is not None
    assert report.embeds.error < 1e-4
    assert report.logits.error < 1e-4


def test_pruned_after_the_tower_too(built: Callable[..., Path], checkpoint: Path) -> None:
    """verify holds what is left against the checkpoint."""
    prune = [ppexport.PixelPrune(), ppexport.PruneSID(12)]
    assert len(ppexport.load(built("ort", "fp32")).encode(SCREEN, prune).keep) <= 12
    report = verify(built("ort", "fp32"), checkpoint, [str(SCREEN)], prune=prune, tokens=6)
    assert report.agreement == 1.0
    assert report.logits.error < 1e-4


@pytest.mark.parametrize("precision", ["int8", "int4", "w8a8"])
def test_quantized(built: Callable[..., Path], checkpoint: Path, precision: str) -> None:
    report = verify(built("ort", precision), checkpoint, [str(SCREEN)], tokens=12)
    assert report.logits.cosine > (0.9 if precision == "int4" else 0.99)


def test_several_images_pruned_and_not_in_one_batch(built: Callable[..., Path]) -> None:
    """As each alone, bit for bit."""
    pages = [str(SCREEN), np.full((200, 300, 3), 90, np.uint8)]
    asked = [
        ppexport.Request("What is this?", pages, prune=ppexport.PixelPrune(), max_new_tokens=6),
        ppexport.Request("And this?", pages[:1], prune=None, max_new_tokens=9),
        ppexport.Request("No image", max_new_tokens=4),
    ]
    bundle = built()
    one_size = open_bundle(bundle)[1].model.vision.side
    with ppexport.load(bundle, reuse=0, max_pixels=None if one_size else 200_000) as pipe:
        alone = [pipe.generate_batch([each])[0].text() for each in asked]
        together = pipe.generate_batch(asked)
        assert [answer.text() for answer in together] == alone
        assert together[0].stats.kept < together[0].stats.total
        assert together[1].stats.kept == together[1].stats.total


def test_every_command(built: Callable[..., Path], checkpoint: Path, tmp_path: Path) -> None:
    bundle = str(built())
    result = tmp_path / "result.json"
    for args in (
        ["run", bundle, "-i", str(SCREEN), "hi", "-n", "3", "--json"],
        ["eval", bundle, "-n", "2", "--skills", "read"],
        [
            "bench",
            bundle,
            "-i",
            str(SCREEN),
            "--runs",
            "2",
            "--cold",
            "0",
            "-n",
            "4",
            "-q",
            "-o",
            str(result),
        ],
        ["plan", str(SCREEN), "--bundle", bundle, "-o", str(tmp_path / "profiles.json")],
        ["verify", bundle, "--against", str(checkpoint), "-n", "4"],
    ):
        done = runner().invoke(main, args)
        assert done.exit_code == 0, (args, done.output, done.stderr)
    assert json.loads(result.read_text())["settings"]


@pytest.mark.parametrize(
    ("dialect", "precision"), usual_and_slow([("plain", "fp16")], [("standard", "bf16")])
)
def test_engines_compile(checkpoint: Path, tmp_path: Path, dialect: str, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    options = Options(capacity=256, max_pixels=65536, compute_capabilities=("8.9",))
    prune = ppexport.PruneSID(16) if dialect == "standard" else "default"
    path = build(
        checkpoint, tmp_path / "bundle", precision, dialect, ["tensorrt-rtx"], None, options, prune=prune
    )
    _, manifest = open_bundle(path)
    (profile,) = engine_record.read(path, manifest, "tensorrt-rtx").engines["vision"].profiles
    assert ("G" in profile) == (manifest.family == "qwen2_5_vl")
    assert ("U" in profile) == manifest.family.startswith("llava")
    if manifest.model.vision.window:
        least, usual, most = profile["G"]
        assert least == 1
        assert usual <= most <= profile["K"][2]
