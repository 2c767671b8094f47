"""What float16 graphs calculate in float32, found by running the model before it is exported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import E2E_PIXELS, GOLDEN, IMAGES
from invariants import relative_error
from safetensors.torch import load_file, save_file

import ppexport
from ppexport.build_bundle import build
from ppexport.calibration import Calibration, synthetic_screens
from ppexport.exporters import fp16_range
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.models import qwen3_vl
from ppexport.runtime.bundle import open_bundle

POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with one layer of each tower so loud that float16 cannot hold the sums after it."""
    path = shutil.copytree(GOLDEN / "e2e" / "model", tmp_path_factory.mktemp("loud") / "checkpoint")
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if "blocks.1.mlp.linear_fc2" in name or "language_model.layers.1.mlp.down_proj" in name:
            tensors[name] = tensors[name] * 1e5
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def largest(path: Path) -> dict[str, dict[str, float]]:
    checkpoint = Checkpoint.open(path)
    screens = synthetic_screens(checkpoint.config.vision.block)
    return fp16_range.measure(checkpoint, qwen3_vl.PREPROCESSING, screens, lambda *_: None)


def test_measure_sees_the_loud_layers(loud: Path) -> None:
    quiet, found = largest(GOLDEN / "e2e" / "model"), largest(loud)
    for graph in ("vision", "language"):
        assert quiet[graph]["residual"] < 100
        assert found[graph]["residual"] > 65504
        assert found[graph]["mlp"] > 65504
        assert found[graph]["attention"] < 100  # the norms before it


def test_an_ordinary_model_needs_only_what_is_always_wide(tmp_path: Path) -> None:
    path = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", "fp16", "plain")
    always = ("norm", "positions")
    assert ppexport.load(path).manifest.float32_kinds == {"vision": always, "language": always}


@pytest.mark.slow
def test_float16_graphs_of_a_loud_model_stay_right(
    loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the check the features and tokens are those of float32; without it they are not even numbers."""
    exact = ppexport.load(build(loud, tmp_path / "exact"), max_pixels=E2E_PIXELS)
    checked = ppexport.load(build(loud, tmp_path / "checked", "fp16", "plain"), max_pixels=E2E_PIXELS)
    kinds = ("norm", "positions", "mlp", "residual")
    assert checked.manifest.float32_kinds == {"vision": kinds, "language": kinds}
    image, ids = IMAGES / "web_gnuplot.png", np.load(GOLDEN / "e2e" / "one_tau0.npz")["input_ids"]
    expected, found = exact.encode(image), checked.encode(image)
    assert relative_error(found.embeds, expected.embeds) < 2e-2
    first, second = (next(pipe.generate_tokens(ids, [image])).logits for pipe in (exact, checked))
    assert relative_error(second, first) < 5e-2
    monkeypatch.setattr(fp16_range, "LIMIT", float("inf"))
    blind = ppexport.load(build(loud, tmp_path / "blind", "fp16", "plain"), max_pixels=E2E_PIXELS)
    assert not np.isfinite(blind.encode(image).embeds).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("blocks.1.attn.qkv", "vision: attention reaches"),
        ("language_model.layers.1.self_attn.o_proj", "language: attention reaches"),
        ("deepstack_merger_list.0.linear_fc2", "vision: features reaches"),
    ],
)
def test_what_has_to_be_in_16_bits_and_does_not_fit_is_refused(
    weight: str, message: str, tmp_path: Path
) -> None:
    path = shutil.copytree(GOLDEN / "e2e" / "model", tmp_path / "checkpoint")
    tensors = load_file(path / "model.safetensors")
    assert any(weight in name for name in tensors)
    for name in tensors:
        if weight in name:
            tensors[name] = tensors[name] * 1e5
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ppexport.CheckpointError, match=rf"{message} \d+ on synthetic.*build with --precision bf16"
    ):
        build(path, tmp_path / "bundle", "fp16", "plain")
    assert not (tmp_path / "bundle").exists()


def test_bfloat16_needs_no_check(loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp16_range, "measure", lambda *_: pytest.fail("measured"))
    path = build(loud, tmp_path / "bundle", "bf16", "standard")
    assert open_bundle(path)[1].float32_kinds["vision"] == ("norm", "positions")
    types = {
        o.type.tensor_type.elem_type
        for o in onnx.load(path / "vision.onnx", load_external_data=False).graph.output
    }
    assert types == {onnx.TensorProto.BFLOAT16}


def test_a_loud_model_compiles(loud: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    for dialect in ("plain", "standard"):
        path = build(loud, tmp_path / dialect, "fp16", dialect, ["tensorrt-rtx"])
        assert (path / "engines" / "tensorrt-rtx" / "vision.engine").stat().st_size > 100_000


@pytest.mark.slow
def test_a_user_s_images_are_tried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is fitted to them; they are named where the model is refused."""
    tried: list[int] = []
    measure = fp16_range.measure

    def counted(*arguments: Any) -> dict[str, dict[str, float]]:
        tried.append(len(arguments[4]))
        return measure(*arguments)

    monkeypatch.setattr(fp16_range, "measure", counted)
    images = Calibration([IMAGES / "pdf_gnuplot-020.png", IMAGES / "web_gnuplot.png"])
    path = build(POCKET, tmp_path / "bundle", "fp16", "plain", calibration=images)
    assert tried == [2]
    assert open_bundle(path)[1].precision.calibrated == 0
    monkeypatch.setattr(fp16_range, "LIMIT", 0.0)
    with pytest.raises(
        ppexport.CheckpointError, match="reaches .* on synthetic screens and 2 images, expected under"
    ):
        build(POCKET, tmp_path / "refused", "fp16", "plain", calibration=images)
