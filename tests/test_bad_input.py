"""What users can get wrong with checkpoints, bundles and requests: one clear message each, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_json
from safetensors.torch import load_file, save_file

import ppexport
from ppexport import build as build_module
from ppexport.build import build


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def edit_config(checkpoint: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    write_json(checkpoint / "config.json", config)


def edit_weights(checkpoint: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def refuse(checkpoint: Path, message: str, error: type[Exception] = ppexport.CheckpointError) -> None:
    output = checkpoint.parent / "out"
    with pytest.raises(error, match=message):
        build(checkpoint, output)
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == [checkpoint.name]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ppexport.CheckpointError, match="no such directory; expected a Hugging Face checkpoint"):
        build(tmp_path / "nowhere", tmp_path / "out")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refuse(checkpoint, "found no config.json")


def test_config_is_not_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    refuse(checkpoint, "config.json cannot be read")


def test_unknown_family(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda c: c.update(model_type="llava"))
    refuse(checkpoint, "model_type is 'llava', expected one of: qwen3_vl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["text_config"].pop("hidden_size"), "text_config: key 'hidden_size' is missing"),
        (lambda c: c["text_config"].update(sliding_window=4), "unknown key 'sliding_window' = 4"),
        (lambda c: c["text_config"].update(hidden_act="relu"), "'hidden_act' is 'relu', expected 'silu'"),
        (lambda c: c["text_config"].update(num_hidden_layers="2"), "'num_hidden_layers' is '2', expected int"),
        (lambda c: c["vision_config"].update(out_hidden_size=7), "out_hidden_size is 7, expected text hidden_size 64"),
        (lambda c: c["vision_config"].update(deepstack_visual_indexes=[0, 9]), "expected rising block numbers under 3"),
        (lambda c: c["vision_config"].update(num_position_embeddings=2300), "expected a square number"),
        (lambda c: c.update(quantization_config={"bits": 4}), "unknown key 'quantization_config'"),
        (lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[4, 4, 4]), "expected a sum of head_dim / 2"),
        (lambda c: c["text_config"]["rope_scaling"].update(rope_type="yarn"), "'rope_type' is 'yarn', expected 'defa"),
    ],
)
def test_wrong_config(checkpoint: Path, change: Callable[[dict], object], message: str) -> None:
    edit_config(checkpoint, change)
    refuse(checkpoint, message)


def test_missing_weight(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.pop("model.visual.merger.norm.bias"))
    refuse(checkpoint, "1 weights are missing from the checkpoint, the first is 'model.visual.merger.norm.bias'")


def test_extra_weight(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"model.visual.adapter": torch.zeros(3)}))
    refuse(checkpoint, "1 weights are not part of a qwen3_vl model .* 'model.visual.adapter'")


def test_wrong_shape(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"lm_head.weight": torch.zeros(5, 64)}))
    refuse(checkpoint, r"weight 'lm_head.weight' has shape \[5, 64\], expected \[264, 64\]")


def test_wrong_dtype(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"lm_head.weight": torch.zeros(264, 64, dtype=torch.int8)}))
    refuse(checkpoint, "'lm_head.weight' has dtype I8, expected F32, F16 or BF16")


def test_truncated_weights(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuse(checkpoint, "model.safetensors: not a complete safetensors file")


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refuse(checkpoint, "found no model.safetensors .*PyTorch .bin files are not read")


def test_missing_shard(checkpoint: Path) -> None:
    write_json(checkpoint / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model-2.safetensors"}})
    refuse(checkpoint, "model-2.safetensors: the file is missing")


def test_weight_missing_from_its_shard(checkpoint: Path) -> None:
    write_json(checkpoint / "model.safetensors.index.json", {"weight_map": {"nothing": "model.safetensors"}})
    refuse(checkpoint, "tensor 'nothing' is missing, which model.safetensors.index.json promises")


def test_weight_outside_float16(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t["lm_head.weight"].fill_(1e6))
    with pytest.raises(ppexport.CheckpointError, match="'lm_head.weight' does not fit float16; build with"):
        build(checkpoint, checkpoint.parent / "out", precision="fp16")
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["checkpoint"]


def test_preprocessor_that_does_not_fit(checkpoint: Path) -> None:
    write_json(checkpoint / "preprocessor_config.json", {"patch_size": 14})
    refuse(checkpoint, "patch_size is 14, expected 16 as in config.json")


def test_existing_output(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ppexport.BundleError, match="out: already exists; remove it or choose another name"):
        build(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()


def test_no_space(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=10_000_000)
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: usage)
    refuse(checkpoint, "10 MB free, expected at least .* MB for the bundle; make room", ppexport.SpaceError)


def test_no_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "available_memory", lambda: 200_000_000)
    refuse(checkpoint, "200 MB of memory are available, expected at least", ppexport.SpaceError)


def test_disk_full_while_writing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ppexport.exporters import bundle as exporter

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.ir, "save", full)
    refuse(checkpoint, "No space left on device; nothing was left behind", ppexport.SpaceError)


def test_flipped_byte(bundle: Path) -> None:
    file = bundle / "language.onnx.data"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ppexport.BundleError, match="language.onnx.data: is damaged, found sha256 .* expected"):
        ppexport.load(bundle)


def test_flipped_byte_in_a_large_file(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppexport.models.manifest.SMALL_FILE", 1000)
    file = bundle / "language.onnx.data"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    ppexport.load(bundle)
    with pytest.raises(ppexport.BundleError, match="language.onnx.data: is damaged"):
        ppexport.load(bundle, verify=True)


def test_missing_and_short_files(bundle: Path) -> None:
    (bundle / "vision.onnx.data").write_bytes(b"")
    with pytest.raises(ppexport.BundleError, match="vision.onnx.data: found 0 bytes, expected"):
        ppexport.load(bundle)
    (bundle / "vision.onnx.data").unlink()
    with pytest.raises(ppexport.BundleError, match="vision.onnx.data: is missing from the bundle"):
        ppexport.load(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "found schema version 2, expected 1; upgrade ppexport"),
        (lambda m: m.update(schema=0), "found schema version 0, expected 1; build the bundle again"),
        (lambda m: m.update(extra=1), "extra: unknown key"),
        (lambda m: m.pop("precision"), "precision: is missing"),
        (lambda m: m["model"]["text"].update(layers="4"), "model.text.layers: found '4', expected int"),
        (lambda m: m["graphs"]["vision"].update(dialect="standard"), "graphs of dialect ort, standard, expected 'ort'"),
    ],
)
def test_other_manifest(bundle: Path, change: Callable[[dict], object], message: str) -> None:
    contents = json.loads((bundle / "bundle.json").read_text())
    change(contents)
    write_json(bundle / "bundle.json", contents)
    with pytest.raises(ppexport.BundleError, match=message):
        ppexport.load(bundle)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(ppexport.BundleError, match="found no bundle.json; expected a bundle made by"):
        ppexport.load(tmp_path)
    with pytest.raises(ppexport.BundleError, match="no such directory"):
        ppexport.load(tmp_path / "nowhere")
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(ppexport.BundleError, match="bundle.json: is damaged"):
        ppexport.load(tmp_path)


def test_prompt_too_long(golden_pipe: ppexport.Pipeline) -> None:
    with pytest.raises(ppexport.RequestError, match="the prompt takes 8192 tokens, expected under 8192 .*context"):
        golden_pipe.generate_tokens([1] * 8192)


def test_answer_stops_at_the_context(golden_pipe: ppexport.Pipeline) -> None:
    stats = ppexport.Stats()
    steps = list(golden_pipe.generate_tokens([1] * 8189, max_new_tokens=50, stats=stats))
    assert len(steps) == 3
    assert stats.finish == "context"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "expected integers"),
        ([[1, 2]], r"shape \(1, 2\), expected integers \[S\]"),
        ([1.5], "dtype float64"),
        ([1, 512], r"input_ids holds 1 ... 512, expected 0 ... 511"),
        ([-1], "input_ids holds -1"),
        ([1, 500], r"runs of \[1\] tokens, expected \[\] \(the full grids of 0 images\)"),
    ],
)
def test_wrong_ids(golden_pipe: ppexport.Pipeline, ids: list, message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        golden_pipe.generate_tokens(ids)


def test_images_without_placeholders(golden_pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    with pytest.raises(ppexport.RequestError, match=r"runs of \[\] tokens, expected \[\d+\]"):
        golden_pipe.generate_tokens([1, 2], [screen])


def test_wrong_arguments(tiny_pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    with pytest.raises(ppexport.RequestError, match="prune is 0.1, expected"):
        tiny_pipe.generate("hi", [screen], prune=0.1)  # type: ignore[arg-type]
    with pytest.raises(ppexport.RequestError, match="images is a str, expected a list of images"):
        tiny_pipe.generate("hi", "a.png")
    with pytest.raises(ppexport.RequestError, match="max_new_tokens is 0, expected at least 1"):
        tiny_pipe.generate("hi", [screen], max_new_tokens=0)
    with pytest.raises(ppexport.RequestError, match="temperature is -1"):
        tiny_pipe.generate("hi", [screen], temperature=-1)


def test_bundle_without_tokenizer(golden_pipe: ppexport.Pipeline) -> None:
    with pytest.raises(ppexport.BundleError, match="has no tokenizer .* use generate_tokens"):
        golden_pipe.generate("hi")
