"""``ppexport verify``: bundles against their checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, IMAGES
from safetensors.torch import load_file, save_file
from terminal import runner

import ppexport
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.verify import compare, divergence, finite, table, verify

ROOT = Path(__file__).resolve().parent.parent
POCKET, SCREEN = ROOT / "models" / "pocket", ROOT / "docs" / "settings.png"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("verify")
    return {name: build(POCKET, folder / name, name) for name in ("bf16", "int8", "int4")}


def test_a_bundle_in_the_checkpoint_s_precision_is_the_checkpoint(bundles: dict[str, Path]) -> None:
    """To rounding of float32; the reference shares no exported graph with it."""
    report = verify(bundles["bf16"], POCKET, [str(SCREEN)])
    assert min(report.embeds.cosine, report.deepstack.cosine, report.logits.cosine) > 0.999999
    assert max(report.embeds.error, report.deepstack.error, report.logits.error) < 1e-4
    assert report.kl < 1e-6
    assert (report.agreement, report.tokens) == (1.0, 64)


def test_precisions_side_by_side(bundles: dict[str, Path]) -> None:
    arguments = [
        "verify",
        *(str(path) for path in bundles.values()),
        "--against",
        str(POCKET),
        "-i",
        str(SCREEN),
    ]
    result = runner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = {Path(r["bundle"]).name: r for r in json.loads(result.stdout)}
    assert found["bf16"]["megabytes"] > found["int8"]["megabytes"] > found["int4"]["megabytes"]
    assert found["bf16"]["kl"] < found["int8"]["kl"] < found["int4"]["kl"] < 0.05
    assert all(r["problems"] == [] and r["agreement"] > 0.9 for r in found.values())
    result = runner().invoke(main, [*arguments, "--no-prune"])
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["bundle", "bf16", "int8", "int4"]
    assert lines[0].split()[1:] == [
        "precision",
        "MB",
        "embeds",
        "deepstack",
        "logits",
        "max",
        "error",
        "KL",
        "agree",
        "first",
        "ms",
        "tokens/s",
    ]


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        ("visual.merger.linear_fc2.weight", "embeds: cosine"),
        ("language_model.layers.3.mlp.down_proj.weight", "next-token distribution: KL"),
    ],
)
def test_a_broken_weight_is_caught(weight: str, problem: str, tmp_path: Path) -> None:
    """One matrix of one layer, shuffled."""
    checkpoint = shutil.copytree(POCKET, tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith(weight)]
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    path = build(checkpoint, tmp_path / "bundle")
    result = runner().invoke(main, ["verify", str(path), "--against", str(POCKET), "-i", str(SCREEN)])
    assert result.exit_code == 1
    assert f"{path}: {problem}" in result.stderr
    assert f"{path}: was not built from these files of {POCKET}: model.safetensors" in result.stderr
    assert ("embeds: cosine" in result.stderr) == problem.startswith("embeds")


def test_without_images_and_with_several(bundles: dict[str, Path]) -> None:
    alone = verify(bundles["bf16"], POCKET, [], "Hello?", tokens=8)
    assert alone.logits.cosine > 0.999999
    assert alone.embeds is alone.deepstack is None
    assert table([alone])[1].split()[3:5] == ["-", "-"]
    several = verify(bundles["bf16"], POCKET, [str(SCREEN), str(IMAGES / "web_gnuplot.png")], tokens=4)
    assert several.logits.cosine > 0.99999


def test_a_bundle_without_a_tokenizer(tmp_path: Path) -> None:
    path = build(GOLDEN / "e2e" / "model", tmp_path / "bundle")
    assert (
        verify(path, GOLDEN / "e2e" / "model", [str(IMAGES / "web_gnuplot.png")], tokens=4).logits.cosine
        > 0.99999
    )


def test_another_checkpoint_is_refused(bundles: dict[str, Path]) -> None:
    with pytest.raises(ppexport.RequestError, match="is not of the model in .*: their configurations differ"):
        verify(bundles["bf16"], GOLDEN / "e2e" / "model", [])


def test_a_placeholder_that_is_generated_is_text(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bundle and to the reference: what is an image is said by rows, not by ids."""
    model = ppexport.load(bundles["bf16"]).manifest.model
    chosen = iter([65, 66, model.image_token, 67, 68])
    monkeypatch.setattr(ppexport.Sampling, "choose", lambda *_: next(chosen))
    report = verify(bundles["bf16"], POCKET, [str(SCREEN)], tokens=5)
    assert report.tokens == 5
    assert report.logits.cosine > 0.999999


def test_json_has_no_nan() -> None:
    assert finite({"a": [1.5, float("nan")], "b": float("inf"), "c": "x"}) == {
        "a": [1.5, None],
        "b": None,
        "c": "x",
    }


def test_measures() -> None:
    a = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert compare(a, a).cosine == 1
    assert compare(a, a[::-1]).cosine == 0
    assert compare(a * 1.1, a).error == pytest.approx(0.1)
    assert compare(np.array([[np.nan, np.inf]]), a[:1]).bad == 2
    assert compare(np.zeros((0, 2)), np.zeros((0, 2))).cosine == 1
    assert divergence(a, a) == pytest.approx(0)
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert divergence(q, p) == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
