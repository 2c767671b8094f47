"""Checkpoints of a decoder alone: bundles without a vision tower, which take text and refuse images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from terminal import runner
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import ppexport
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.models.families import EXPERTS, FAMILIES, family_of
from ppexport.trt_build import Options
from ppexport.verify import verify

SCREEN = GOLDEN.parent.parent / "docs" / "settings.png"
IDS = np.random.default_rng(1).integers(5, 200, 70)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves it."""
    directory = tmp_path_factory.mktemp("text_only") / "checkpoint"
    torch.manual_seed(2)
    config = Qwen3_5TextConfig(**random_config("qwen3_5_text", "tiny", "float32"))
    model = Qwen3_5ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(directory)
    write_text_files(directory, "qwen3_5_text")
    return directory


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return build(checkpoint, checkpoint.parent / "bundle", "fp32")


def test_it_is_the_model_of_transformers(checkpoint: Path, bundle: Path) -> None:
    """Logits of the prompt and of every token behind it."""
    with ppexport.load(bundle) as pipe:
        steps = list(pipe.generate_tokens(IDS, max_new_tokens=6, stop=()))
    model = Qwen3_5ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = np.concatenate([IDS, [step.token for step in steps[:-1]]])
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0, len(IDS) - 1 :].numpy()
    found = np.stack([step.logits for step in steps])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_it_has_no_graph_for_images(checkpoint: Path, bundle: Path) -> None:
    assert sorted(path.name for path in bundle.iterdir() if ".onnx" in path.name) == [
        "language.onnx",
        "language.onnx.data",
    ]
    report = verify(bundle, checkpoint, [], tokens=4)
    assert report.agreement == 1.0
    assert report.embeds is None


def test_images_are_refused(bundle: Path) -> None:
    refused = "expected none: a qwen3_5_text model takes text only"
    with pytest.raises(ppexport.RequestError, match="limits of pixels are given, expected none"):
        ppexport.load(bundle, max_pixels=100_000)
    with ppexport.load(bundle) as pipe:
        assert pipe.generate("Hello", max_new_tokens=3).text() is not None
        for ask in (
            lambda: pipe.generate("What?", SCREEN),
            lambda: pipe.encode(SCREEN),
            lambda: pipe.select(SCREEN, None),
        ):
            with pytest.raises(ppexport.ImageError, match=refused):
                ask()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("plan {image} --bundle {bundle} -o {new}", "expected one that takes images"),
        ("inspect {image} --bundle {bundle}", "takes text only"),
        (
            "eval {bundle} -n 1 --skills read",
            "expected one that takes images, since every question is about an image",
        ),
        (
            "bench {bundle} --runs 2 -q",
            "expected one that takes images, since every question is about an image",
        ),
        ("build {checkpoint} -o {new} --prunesid 12", "found a pruner for a qwen3_5_text model"),
        ("build {checkpoint} -o {new} --precision int4 --calibrate {image}", "found images to calibrate"),
    ],
)
def test_what_needs_images_says_so(
    bundle: Path, checkpoint: Path, tmp_path: Path, command: str, expected: str
) -> None:
    new = tmp_path / "new"
    filled = command.format(image=SCREEN, bundle=bundle, checkpoint=checkpoint, new=new)
    done = runner().invoke(main, filled.split())
    assert done.exit_code == 1
    assert expected in done.stderr
    assert not new.exists()


@pytest.mark.parametrize("precision", ["int4", "w8a8"])
def test_quantized(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    report = verify(build(checkpoint, tmp_path / "bundle", precision), checkpoint, [], tokens=8)
    assert report.logits.cosine > 0.9


def test_engines_compile(checkpoint: Path, tmp_path: Path) -> None:
    """In fp16, which first runs the model on text alone."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    options = Options(capacity=256, compute_capabilities=("8.9",))
    path = build(checkpoint, tmp_path / "bundle", "fp16", "plain", ["tensorrt-rtx"], None, options)
    assert [each.name for each in (path / "engines" / "tensorrt-rtx").glob("*.engine")] == ["language.engine"]
    done = runner().invoke(main, ["plan", "--memory", "--bundle", str(path)])
    assert done.exit_code == 0
    assert "images of up to" not in done.output


def test_a_whole_checkpoint_that_is_said_to_be_a_decoder(tmp_path: Path) -> None:
    """Its tower is left out, as transformers leaves it out; so are the layers that guess several tokens ahead."""
    config = random_config("qwen3_5", "tiny")
    whole = tmp_path / "whole"
    write_random(config, whole)
    tensors = load_file(whole / "model.safetensors")
    tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, whole / "model.safetensors")
    build(whole, tmp_path / "seeing")
    (whole / "config.json").write_text(json.dumps(random_config("qwen3_5_text", "tiny")))
    bundle = build(whole, tmp_path / "bundle")
    with ppexport.load(bundle) as pipe, ppexport.load(tmp_path / "seeing") as seeing:
        found, expected = (
            [step.token for step in p.generate_tokens(IDS, max_new_tokens=5)] for p in (pipe, seeing)
        )
        assert found == expected


def test_the_section_is_the_whole() -> None:
    alone, section = (random_config(family, "2b") for family in ("qwen3_5_text", "qwen3_5"))
    assert FAMILIES["qwen3_5_text"].parse(alone).text == FAMILIES["qwen3_5"].parse(section).text


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_named(family: str) -> None:
    with pytest.raises(ppexport.CheckpointError, match=f"model_type is '{family}', a mixture of experts"):
        family_of({"model_type": family})
