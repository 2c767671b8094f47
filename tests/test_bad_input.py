"""What users can get wrong with checkpoints, bundles and requests: one clear message each, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_json
from safetensors.torch import load_file, save_file

import ppexport
from ppexport import build_bundle as build_module
from ppexport.build_bundle import build


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


def check_refused(checkpoint: Path, message: str, error: type[Exception] = ppexport.CheckpointError) -> None:
    output = checkpoint.parent / "out"
    with pytest.raises(error, match=message):
        build(checkpoint, output)
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == [checkpoint.name]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        ppexport.CheckpointError, match="no such directory; expected a Hugging Face checkpoint"
    ):
        build(tmp_path / "nowhere", tmp_path / "out")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    check_refused(checkpoint, "found no config.json")


def test_config_is_not_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    check_refused(checkpoint, "config.json cannot be read")


def test_unknown_family(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda c: c.update(model_type="bert"))
    check_refused(
        checkpoint,
        "model_type is 'bert', expected one of: llava, llava_next, qwen2_5_vl, qwen2_vl, qwen3_5, "
        "qwen3_5_text, qwen3_vl",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("text_config"), "config.json: key 'text_config' is missing"),
        (
            lambda c: c["text_config"].update(sliding_window=4),
            "'sliding_window' is 4, expected None: other values",
        ),
        (lambda c: c["text_config"].update(hidden_act="relu"), "'hidden_act' is 'relu', expected 'silu'"),
        (
            lambda c: c["text_config"].update(num_hidden_layers="2"),
            "'num_hidden_layers' is '2', expected int",
        ),
        (
            lambda c: c["vision_config"].update(out_hidden_size=7),
            "the vision tower gives features of width 7, expected the decoder's 64",
        ),
        (
            lambda c: c["vision_config"].update(deepstack_visual_indexes=[0, 9]),
            "expected rising block numbers under 3",
        ),
        (lambda c: c["vision_config"].update(num_position_embeddings=2300), "expected a square number"),
        (lambda c: c.update(quantization_config={"bits": 4}), "the checkpoint is quantized already"),
        (
            lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[4, 4, 4]),
            "expected a sum of half the head's width",
        ),
        (lambda c: c["text_config"].update(rms_norm_eps=float("nan")), "expected a finite number over 0"),
        (
            lambda c: c["text_config"].update(num_attention_heads=0),
            "'num_attention_heads' is 0, expected at least 1",
        ),
        (
            lambda c: c["vision_config"].update(deepstack_visual_indexes=["a"]),
            "expected a list of whole numbers",
        ),
        (
            lambda c: c["vision_config"].update(deepstack_visual_indexes=[-1]),
            "expected a list of whole numbers from 0",
        ),
        (
            lambda c: c["text_config"].update(layer_types=["sliding_attention"]),
            "'full_attention' for every layer",
        ),
        (
            lambda c: c.update(image_token_id=264),
            "image_token_id is 264, expected under the vocabulary's 264",
        ),
        (lambda c: c.update(model_type=[]), "model_type is .., expected one of"),
        (
            lambda c: c["text_config"]["rope_scaling"].update(rope_type="ntk"),
            "rope_type is 'ntk', expected 'default' or",
        ),
    ],
)
def test_wrong_config(checkpoint: Path, change: Callable[[dict], object], message: str) -> None:
    edit_config(checkpoint, change)
    check_refused(checkpoint, message)


def test_missing_weight(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.pop("model.visual.merger.norm.bias"))
    check_refused(
        checkpoint,
        "lacks weights that its configuration asks for \\(1\\), first 'model.visual.merger.norm.bias'",
    )


def test_extra_weight(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"model.visual.adapter": torch.zeros(3)}))
    check_refused(checkpoint, "1 weights are not part of a qwen3_vl model .* 'model.visual.adapter'")


def test_wrong_shape(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"lm_head.weight": torch.zeros(5, 64)}))
    check_refused(checkpoint, r"weight 'lm_head.weight' has shape \[5, 64\], expected \[264, 64\]")


def test_wrong_dtype(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t.update({"lm_head.weight": torch.zeros(264, 64, dtype=torch.int8)}))
    check_refused(checkpoint, "'lm_head.weight' has dtype I8, expected F32, F16 or BF16")


def test_truncated_weights(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    check_refused(checkpoint, "model.safetensors: not a complete safetensors file")


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    check_refused(checkpoint, "found no model.safetensors .*PyTorch .bin files are not read")


def shard(checkpoint: Path, where: Callable[[str], str]) -> dict[str, str]:
    """Spread the weights over the files that ``where`` names, with an index."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = {name: where(name) for name in tensors}
    for file in set(names.values()):
        (checkpoint / file).parent.mkdir(exist_ok=True)
        save_file({n: t for n, t in tensors.items() if names[n] == file}, checkpoint / file)
    write_json(checkpoint / "model.safetensors.index.json", {"weight_map": names})
    return names


def test_sharded_checkpoint_builds_the_same_bundle(checkpoint: Path, tiny_bundle: Path) -> None:
    shard(checkpoint, lambda name: "a.safetensors" if "visual" in name else "more/b.safetensors")
    bundle = build(checkpoint, checkpoint.parent / "out")
    for name in ("vision.onnx.data", "language.onnx.data"):
        assert (bundle / name).read_bytes() == (tiny_bundle / name).read_bytes()


def test_missing_shard(checkpoint: Path) -> None:
    shard(checkpoint, lambda name: "a.safetensors" if "visual" in name else "b.safetensors")
    (checkpoint / "b.safetensors").unlink()
    check_refused(checkpoint, "b.safetensors: the file is missing")


def test_index_that_does_not_match_its_shards(checkpoint: Path) -> None:
    names = shard(checkpoint, lambda name: "a.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    write_json(index, {"weight_map": {**names, "nothing": "a.safetensors"}})
    check_refused(
        checkpoint, "a.safetensors: tensor 'nothing' is missing, which model.safetensors.index.json promises"
    )
    write_json(index, {"weight_map": {"lm_head.weight": "a.safetensors"}})
    check_refused(checkpoint, "a.safetensors: holds .* which model.safetensors.index.json does not list")
    write_json(index, {"weight_map": {"lm_head.weight": "../../etc/passwd"}})
    check_refused(checkpoint, "is outside the checkpoint")
    write_json(index, {"weight_map": {"lm_head.weight": 5}})
    check_refused(checkpoint, "found no weight_map")


def test_checkpoint_is_a_file(checkpoint: Path) -> None:
    with pytest.raises(
        ppexport.CheckpointError, match="config.json: is a file; expected a Hugging Face checkpoint"
    ):
        build(checkpoint / "config.json", checkpoint.parent / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer and chat template do not work: tokenizer.json cannot be read"),
        ("chat_template.jinja", "{% if %}", "chat_template.jinja cannot be compiled"),
        ("chat_template.jinja", "no picture", "holds 0 image placeholders, expected 1"),
        (
            "generation_config.json",
            '{"eos_token_id": ["a"]}',
            "eos_token_id is .'a'., expected token ids under 264",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": 264}',
            "eos_token_id is 264, expected token ids under 264",
        ),
        ("generation_config.json", "[]", "generation_config.json: found list, expected a JSON object"),
    ],
)
def test_text_files_that_do_not_work(checkpoint: Path, name: str, content: str, message: str) -> None:
    (checkpoint / name).write_text(content)
    check_refused(checkpoint, message)


def test_tokenizer_larger_than_the_vocabulary(checkpoint: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.add_tokens(["more", "and more"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    check_refused(
        checkpoint, "tokenizer.json has token 264, expected ids under the model's vocabulary of 264"
    )


def test_weight_outside_float16(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda t: t["lm_head.weight"].fill_(1e6))
    with pytest.raises(ppexport.CheckpointError, match="'lm_head.weight' does not fit float16; build with"):
        build(checkpoint, checkpoint.parent / "out", precision="fp16")
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 14}, "'patch_size' is 14, expected 16"),
        ({"temporal_patch_size": 4}, "'temporal_patch_size' is 4, expected 2"),
        ({"do_normalize": False}, "'do_normalize' is False, expected True"),
        ({"rescale_factor": 0.5}, "rescale_factor is 0.5, expected 1/255"),
        ({"do_center_crop": True}, "'do_center_crop' is True, expected False"),
        ({"image_std": [0, 0, 0]}, "image_std is .*, expected numbers over 0"),
        ({"image_mean": [0.5]}, "'image_mean' is .0.5., expected three numbers"),
        ({"size": 448}, "'size' is 448, expected an object"),
        ({"size": {"height": 448, "width": 448}}, "unknown key 'height' = 448"),
        ({"size": {"shortest_edge": 9000, "longest_edge": 10}}, "9000 to 10 pixels, expected a rising range"),
        ({"max_pixels": "9"}, "'max_pixels' is '9', expected int"),
    ],
)
def test_preprocessor_that_does_not_fit(checkpoint: Path, change: dict, message: str) -> None:
    write_json(checkpoint / "preprocessor_config.json", change)
    check_refused(checkpoint, message)


def test_existing_output(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ppexport.BundleError, match="out: already exists; remove it or choose another name"):
        build(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()


def test_no_space(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: usage)
    check_refused(
        checkpoint, "1 MB free, expected at least .* MB for the bundle; make room", ppexport.SpaceError
    )


def test_no_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "available_memory", lambda: 200_000_000)
    check_refused(checkpoint, "200 MB of memory are available, expected at least", ppexport.SpaceError)


def test_disk_full_while_writing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ppexport.exporters import bundle as exporter

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.ir, "save", full)
    check_refused(checkpoint, "No space left on device; nothing was left behind", ppexport.SpaceError)


def test_flipped_byte(bundle: Path) -> None:
    file = bundle / "language.onnx.data"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        ppexport.BundleError, match="language.onnx.data: is damaged, found sha256 .* expected"
    ):
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


def test_a_file_of_somebody_else(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "vision.onnx" and allowed(path, mode))
    with pytest.raises(
        ppexport.BundleError, match=r"vision.onnx: cannot be read; expected files that this user"
    ):
        ppexport.load(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=8), "found schema version 8, expected 7; upgrade ppexport"),
        (
            lambda m: m.update(schema=0),
            "found schema version 0, expected 7; build it again: ppexport build CHECKPOINT -o",
        ),
        (lambda m: m.update(extra=1), "extra: unknown key"),
        (lambda m: m["model"]["states"].append(m["model"]["states"][0]), "expected each state once"),
        (
            lambda m: m["model"]["states"][0].update(shape=["slots", "X"]),
            "expected shape slots, ..., with M at most once",
        ),
        (lambda m: m["model"]["states"].pop(), "its states and those of bundle.json differ in 'value_"),
        (
            lambda m: m.update(family="nope"),
            "family: found 'nope', expected one of: llava, llava_next, qwen2_vl, qwen2_5_vl, qwen3_vl, "
            "qwen3_5, qwen3_5_text",
        ),
        (lambda m: m["model"]["vision"].update(merge=0), "merge is 0, expected at least 1"),
        (lambda m: m["model"]["text"].update(width=-1), "width is -1, expected at least 1"),
        (lambda m: m["model"]["text"].update(vocab=10**12), "expected at least 1 and less than 2 [*][*] 31"),
        (lambda m: m["model"]["text"].update(vocab=10**30), "vocab: found 10+, expected a finite number"),
        (
            lambda m: m["model"]["vision"].update(norm_eps=float("nan")),
            "norm_eps: found nan, expected a finite",
        ),
        (lambda m: m["model"]["text"]["rope"].update(sections=[3]), "expected a sum of width / 2"),
        (lambda m: m["prune"].append(m["prune"][0]), "prune: prune names the pruners pixelprune, pixelprune"),
        (lambda m: m.pop("precision"), "precision: is missing"),
        (lambda m: m.update(compute="fp8"), "compute: found 'fp8', expected one of: fp32, fp16, bf16"),
        (lambda m: m.update(interface="voice"), "interface: found 'voice', expected one of: text, tokens"),
        (lambda m: m.update(files={}), "files: 'chat_template.jinja' is not listed"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "expected plain file names"),
        (lambda m: m["graphs"].pop("prune"), "graphs: found .*, expected language, prune, vision"),
        (lambda m: m["model"]["text"].update(layers="4"), "model.text.layers: found '4', expected int"),
        (
            lambda m: m["graphs"]["vision"].update(dialect="standard"),
            "graphs of dialect ort, standard, expected 'ort'",
        ),
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
    with pytest.raises(ppexport.BundleError, match="the bundle is None, expected the path"):
        ppexport.load(None)  # type: ignore[arg-type]
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(ppexport.BundleError, match="bundle.json: is a file; expected a bundle directory"):
        ppexport.load(tmp_path / "bundle.json")
    with pytest.raises(ppexport.BundleError, match="bundle.json: is damaged"):
        ppexport.load(tmp_path)


def test_prompt_too_long(golden_pipe: ppexport.Pipeline) -> None:
    with pytest.raises(
        ppexport.RequestError, match="the prompt takes 8192 tokens, expected under 8192 .*context"
    ):
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
        ([1, 500], r"runs of \[1\] tokens, expected \[\] \(of 0 whole images\)"),
    ],
)
def test_wrong_ids(golden_pipe: ppexport.Pipeline, ids: list, message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        golden_pipe.generate_tokens(ids)


def test_images_without_placeholders(golden_pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    with pytest.raises(ppexport.RequestError, match=r"runs of \[\] tokens, expected \[\d+\]"):
        golden_pipe.generate_tokens([1, 2], [screen])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune": 0.1}, "prune is 0.1, expected ppexport.PixelPrune"),
        ({"prune": np.zeros(2)}, "prune is array"),
        ({"images": {"a.png"}}, "images is a set, expected a list of images"),
        ({"images": None}, "images is a NoneType, expected a list of images"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', expected a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
        ({"temperature": -1}, "temperature is -1, expected 0"),
        ({"temperature": "hot"}, "temperature is 'hot', expected 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected 0"),
        ({"top_p": None}, "top_p is None, expected more than 0"),
        ({"top_k": 1.5}, "top_k is 1.5, expected a whole number"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"prompt": "\udcff"}, "the prompt is not valid text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            "holds the part .'type': 'video'., expected",
        ),
        (
            {"prompt": [{"role": "user", "content": 5}]},
            "a message has content of type int, expected text or a list of parts",
        ),
    ],
)
def test_wrong_arguments(
    tiny_pipe: ppexport.Pipeline, screen: np.ndarray, arguments: dict, message: str
) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        tiny_pipe.generate(**{"prompt": "hi", "images": [screen], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune": "default"}, "prune is 'default', expected ppexport.PixelPrune"),
        ({"patch": None}, "patch is None, expected a whole number"),
        ({"patch": -16, "merge": -2}, "patch is -16, expected at least 1"),
        ({"min_pixels": None}, "min_pixels is None, expected a whole number"),
        (
            {"min_pixels": 10**11, "max_pixels": 10**12},
            "would be resized to .* expected at most 100000000 pixels",
        ),
    ],
)
def test_wrong_arguments_of_select(screen: np.ndarray, arguments: dict, message: str) -> None:
    with pytest.raises(ppexport.PpexportError, match=message):
        ppexport.select(screen, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": "a"}, "threads is 'a', expected a whole number"),
        ({"threads": -3}, r"threads is -3, expected 0 to \d+"),
        ({"max_pixels": "5"}, "max_pixels is '5', expected a whole number"),
    ],
)
def test_wrong_arguments_of_load(tiny_bundle: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ppexport.RequestError, match=message):
        ppexport.load(tiny_bundle, **arguments)


def test_statistics_are_for_one_request(golden_pipe: ppexport.Pipeline) -> None:
    stats = ppexport.Stats()
    assert len(list(golden_pipe.generate_tokens([1, 2], max_new_tokens=3, stats=stats))) == 3
    with pytest.raises(ppexport.RequestError, match="stats is not a fresh ppexport.Stats"):
        golden_pipe.generate_tokens([1, 2], max_new_tokens=3, stats=stats)


def test_bundle_without_tokenizer(golden_pipe: ppexport.Pipeline) -> None:
    with pytest.raises(ppexport.BundleError, match="has no tokenizer .* use generate_tokens"):
        golden_pipe.generate("hi")
