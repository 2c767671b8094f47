"""Checkpoints that others made: what their tools add to configurations, and how they name weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import usual_and_slow, write_json
from known_keys import known_keys as keys_of_transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import ppexport
from ppexport.build_bundle import build
from ppexport.exporters import bundle as exporter
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.exporters.decoders.attention import Decoder, constants
from ppexport.exporters.random_checkpoint import random_config
from ppexport.models import qwen3_vl
from ppexport.models.config import ModelConfig, Preprocessing
from ppexport.models.families import FAMILIES
from ppexport.models.hfconfig import ASKED_FOR, HARMLESS, defaults_of, known_keys
from ppexport.models.qwen2_5_vl import windows_of

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "models" / "pocket"
CONFIGS = Path(__file__).parent / "configs" / "qwen3_vl"
POCKET_RAW = json.loads((POCKET / "config.json").read_text(encoding="utf-8"))

# what is told of each tool's files, beyond what every checkpoint without weights of its own is told
IGNORED = {
    "transformers_4.57": [],
    "transformers_5.23": [],
    "trainer": ["config.json: 'hidden_size'"],
    "unsloth": [
        "config.json: 'model_name'",
        "config.json: 'unsloth_fixed'",
        "config.json: 'unsloth_version'",
    ],
    "llama_factory": [
        "config.json: 'hidden_size'",
        "preprocessor_config.json: 'image_max_pixels'",
        "preprocessor_config.json: 'image_min_pixels'",
    ],
    "ms_swift": [
        "config.json: text_config: 'note'",
        "config.json: 'hidden_size'",
        "config.json: 'keys_to_ignore_at_inference'",
    ],
}


@pytest.fixture
def pocket(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(POCKET, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    )


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object], file: str = "config.json") -> None:
    contents = json.loads((checkpoint / file).read_text(encoding="utf-8"))
    change(contents)
    write_json(checkpoint / file, contents)


def edit_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def preprocessing(checkpoint: Path) -> Preprocessing:
    return exporter.plan(checkpoint).preprocessing


@pytest.mark.parametrize("tool", IGNORED)
def test_configurations_that_tools_write(tool: str, pocket: Path) -> None:
    """The same model comes out of all of them, and what was ignored is named."""
    expected, numbers = Checkpoint.open(pocket).config, preprocessing(pocket)
    (pocket / "preprocessor_config.json").unlink()
    shutil.copytree(CONFIGS / tool, pocket, dirs_exist_ok=True)
    plan = exporter.plan(pocket)
    assert plan.checkpoint.config == expected
    assert plan.preprocessing == numbers
    told = [notice for notice in plan.notices if "is ignored, as transformers ignores it" in notice]
    assert [notice.partition(" is ignored")[0] for notice in told] == IGNORED[tool]


def test_every_folder_of_configurations_is_tested() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == set(IGNORED)


def test_known_keys_are_those_of_transformers() -> None:
    """Written anew by: python tests/known_keys.py > models/known_keys.json"""
    assert known_keys() == keys_of_transformers()


def section_of(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return raw if name == "config.json" else raw[name]


def other(value: Any) -> Any:
    """A value that no model has there by default."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 6
    return ["odd"] if isinstance(value, (list, tuple)) else {"odd": 1} if isinstance(value, dict) else "odd"


def sections(family: str) -> dict[str, Any]:
    """A small configuration with a text section, as transformers 5 writes it."""
    raw = random_config(family, "tiny")
    if "text_config" not in raw:
        known = defaults_of(family, "text_config")
        moved = [key for key in raw if (key in known or key.startswith("rope")) and key != "dtype"]
        raw["text_config"] = {key: raw.pop(key) for key in moved}
    return raw


def of_part(section: dict[str, Any]) -> dict[str, Any]:
    """The keys of a part that is a model of its own."""
    return defaults_of(section["model_type"], "config.json")


@pytest.mark.parametrize("section", ["config.json", "text_config", "vision_config"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen3_5_text"}))  # a section of another's
def test_every_key_that_transformers_knows_counts(family: str, section: str) -> None:
    """Another value changes the model, is refused, or is known to be harmless; nothing is passed over."""
    small = sections(family)
    if "max_window_layers" in small["text_config"]:
        small["text_config"]["max_window_layers"] = 1  # so that windows, if there were any, would count
    base = FAMILIES[family].parse(small)
    harmless = {*HARMLESS, *known_keys()["generation"]}
    harmless |= {"video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings"}
    # of videos; of layers that attend within a window, where there are some
    harmless |= {"tokens_per_second", "sliding_window", "max_window_layers"}
    harmless |= {"image_seq_length", "projection_dim", "initializer_factor", "pretraining_tp"}
    if "rope_theta" in small["text_config"].get("rope_parameters", {}):
        harmless.add("rope_theta")  # beside it
    known = defaults_of(family, section) if section in known_keys()[family] else of_part(small[section])
    for key, default in known.items():
        raw = json.loads(json.dumps(small))
        section_of(raw, section)[key] = other(section_of(raw, section).get(key, default))
        notices: list[str] = []
        try:
            changed = FAMILIES[family].parse(raw, notices) != base
        except ppexport.CheckpointError:
            changed = True
        told = [notice for notice in notices if f"'{key}'" in notice]
        of_decoder = [notice for notice in told if "ignored, since there is a text_config" in notice]
        assert changed or of_decoder or key in harmless, key
        assert told == of_decoder, key


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_decoder_at_the_top_is_the_decoder_in_a_section(family: str) -> None:
    """Published files hold it at the top, transformers 5 writes a section."""
    flat = random_config(family, "tiny")
    assert "text_config" not in flat
    assert FAMILIES[family].parse(flat) == FAMILIES[family].parse(sections(family))
    theirs = AutoConfig.for_model(**json.loads(json.dumps(flat)))
    assert FAMILIES[family].parse(json.loads(theirs.to_json_string())) == FAMILIES[family].parse(flat)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"use_sliding_window": True, "max_window_layers": 1},
            "use_sliding_window is true for layers from 1 on",
        ),
        ({"num_attention_heads": 6}, "hidden_size 64, expected a multiple of the 6 attention heads"),
        (
            {"hidden_size": 96, "num_attention_heads": 6},
            "the vision tower gives features of width 64, expected the decoder's 96",
        ),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}},
            "expected a sum of half the head's",
        ),
    ],
)
def test_decoders_that_are_not_computed(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ppexport.CheckpointError, match=message):
        FAMILIES[family].parse({**random_config(family, "tiny"), **change})


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_file_that_says_everything_twice(family: str) -> None:
    """As transformers 4.52 to 4.56 wrote them: the section counts, also in transformers."""
    flat = random_config(family, "tiny")
    both = {**flat, "text_config": sections(family)["text_config"], "rope_theta": 7.0, "hidden_size": 640}
    notices: list[str] = []
    assert FAMILIES[family].parse(both, notices) == FAMILIES[family].parse(flat)
    (told,) = [notice for notice in notices if "ignored, since there is a text_config" in notice]
    assert "'rope_scaling'" in told
    assert "'eos_token_id'" not in told
    theirs = AutoConfig.for_model(**json.loads(json.dumps(both))).text_config
    assert theirs.hidden_size == 64
    assert theirs.rope_parameters["rope_theta"] == flat["rope_theta"]


@pytest.mark.parametrize("top", [None, False, True])
@pytest.mark.parametrize("text", [None, False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_heads_are_tied_as_transformers_ties_them(family: str, text: bool | None, top: bool | None) -> None:
    raw = sections(family)
    del raw["tie_word_embeddings"]
    raw |= {} if top is None else {"tie_word_embeddings": top}
    raw["text_config"] |= {} if text is None else {"tie_word_embeddings": text}
    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    assert FAMILIES[family].parse(raw).text.tied_head == theirs.tie_word_embeddings


def test_a_window_that_is_null_is_none() -> None:
    raw = random_config("qwen2_vl", "tiny") | {"use_sliding_window": True, "max_window_layers": 0}
    assert FAMILIES["qwen2_vl"].parse({**raw, "sliding_window": None}).text.layers == 2
    with pytest.raises(ppexport.CheckpointError, match="use_sliding_window is true"):
        FAMILIES["qwen2_vl"].parse(raw)


def test_an_end_that_nobody_names_is_that_of_transformers() -> None:
    raw = random_config("qwen2_vl", "tiny")
    del raw["eos_token_id"]
    assert FAMILIES["qwen2_vl"].parse(raw).eos_tokens == (151645,)
    assert FAMILIES["qwen3_vl"].parse(POCKET_RAW).eos_tokens == (258,)


def test_limits_that_are_written_twice(pocket: Path) -> None:
    """As 4.45 to 4.48 wrote them: transformers takes those at the top."""
    size = {"min_pixels": 3136, "max_pixels": 4000000}
    edit(
        pocket,
        lambda c: c.update(min_pixels=6272, max_pixels=3000000, size=size),
        "preprocessor_config.json",
    )
    found = preprocessing(pocket)
    assert (found.min_pixels, found.max_pixels) == (6272, 3000000)


def test_a_head_width_in_the_section_counts() -> None:
    """transformers turns as many values of a head as that says, and does not read it at the top."""
    raw = sections("qwen2_vl")
    raw["text_config"]["head_dim"] = 32
    with pytest.raises(ppexport.CheckpointError, match="'head_dim' is 32, expected 16"):
        FAMILIES["qwen2_vl"].parse(raw)
    notices: list[str] = []
    FAMILIES["qwen2_vl"].parse({**random_config("qwen2_vl", "tiny"), "head_dim": 32}, notices)
    assert "config.json: 'head_dim' is ignored, as transformers ignores it" in notices


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 20}, "window_size is 20, expected at least the 28 pixels of one merged token"),
        (
            {"fullatt_block_indexes": [1, 9]},
            r"fullatt_block_indexes \[1, 9\], expected rising block numbers under 4",
        ),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', expected 'silu'"),
    ],
)
def test_towers_that_are_not_computed(change: dict[str, Any], message: str) -> None:
    raw = random_config("qwen2_5_vl", "tiny")
    raw["vision_config"].update(change)
    with pytest.raises(ppexport.CheckpointError, match=message):
        FAMILIES["qwen2_5_vl"].parse(raw)


def test_windows_hold_every_kept_token_once() -> None:
    """On random selections; none is empty, and each token lies in the window of its place."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        rows, columns, side = rng.integers(1, 14, 3)
        keep = np.flatnonzero(rng.random(rows * columns) < rng.random()).astype(np.int32)
        keep = keep if len(keep) else np.array([0], np.int32)
        windows, places = windows_of(int(columns), int(side), keep)
        assert windows.dtype == places.dtype == np.int32
        assert (windows.reshape(-1)[places] == np.arange(len(keep))).all()
        assert (windows >= 0).any(1).all()
        assert (windows >= 0).sum() == len(keep)
        for window in windows:
            row, column = np.divmod(keep[window[window >= 0]], columns)
            assert len({*zip((row // side).tolist(), (column // side).tolist(), strict=True)}) == 1
        assert len(windows) == len({(k // columns // side, k % columns // side) for k in keep.tolist()})


@pytest.mark.parametrize("key", ASKED_FOR)
def test_keys_that_every_configuration_is_asked_for_are_refused(key: str) -> None:
    raw = json.loads(json.dumps(POCKET_RAW))
    raw["text_config"][key] = ["sliding_attention"] if key == "layer_types" else 16
    with pytest.raises(
        ppexport.CheckpointError, match=f"text_config: '{key}' is .*other values are not supported"
    ):
        qwen3_vl.QWEN3_VL.parse(raw)


@pytest.mark.parametrize(
    "key", ["head_dim", "num_key_value_heads", "rope_theta", "hidden_act", "spatial_merge_size"]
)
def test_absent_keys_have_the_defaults_of_transformers(key: str) -> None:
    raw = json.loads(json.dumps(POCKET_RAW))
    section = "vision_config" if key == "spatial_merge_size" else "text_config"
    raw["text_config"].update(
        num_attention_heads=32, rope_scaling={"mrope_section": [24, 20, 20]}, head_dim=128
    )
    raw["text_config"].pop(key, None)
    raw[section].pop(key, None)
    theirs = Qwen3VLConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    ours = qwen3_vl.QWEN3_VL.parse(raw)
    text = theirs.text_config
    assert ours.text.head_dim == text.head_dim
    assert ours.text.kv_heads == text.num_key_value_heads
    assert ours.text.rope.theta == text.rope_parameters["rope_theta"]
    assert ours.vision.merge == theirs.vision_config.spatial_merge_size


def test_null_key_value_heads_are_one_for_every_query_head() -> None:
    raw = json.loads(json.dumps(POCKET_RAW))
    raw["text_config"]["num_key_value_heads"] = None
    assert qwen3_vl.QWEN3_VL.parse(raw).text.kv_heads == 4


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 4.0},
        {"type": "yarn", "factor": 2.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.2},
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5},
        {"rope_type": "default"},
    ],
)
def test_rotary_frequencies_equal_transformers(rope: dict[str, Any]) -> None:
    """YaRN among them, which the model's authors recommend for long contexts."""
    raw = json.loads(json.dumps(POCKET_RAW))
    raw["text_config"].pop("rope_theta")
    raw["text_config"]["rope_scaling"] = {**rope, "mrope_section": [8, 8, 8], "rope_theta": 20000.0}
    text = Qwen3VLConfig(
        **{k: v for k, v in json.loads(json.dumps(raw)).items() if k != "model_type"}
    ).text_config
    theirs = Qwen3VLTextRotaryEmbedding(text)
    ours = qwen3_vl.QWEN3_VL.parse(raw)
    decoder = Decoder(ours)
    decoder.axis_freq = torch.from_numpy(constants(ours)["axis_freq"])
    positions = torch.randint(0, 4000, (3, 1, 50), dtype=torch.int32)
    cos, sin = theirs(torch.zeros(1), positions)
    for found, expected in zip(decoder.rotary_tables(positions), (cos, sin), strict=True):
        np.testing.assert_allclose(found.numpy(), expected[..., : found.shape[-1]].numpy(), atol=1e-3)


@pytest.mark.slow
def test_yarn_runs_and_makes_room(pocket: Path, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 2048}
    edit(pocket, lambda c: c["text_config"]["rope_scaling"].update(yarn))
    pipe = ppexport.load(build(pocket, tmp_path / "bundle"))
    assert pipe.context == 6144
    model = Qwen3VLForConditionalGeneration.from_pretrained(pocket, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(0, 255, 40)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    (step,) = pipe.generate_tokens(ids, max_new_tokens=1)
    np.testing.assert_allclose(step.logits, expected, atol=2e-3 * np.abs(expected).max())


def test_other_rotary_types_are_refused_by_name() -> None:
    raw = json.loads(json.dumps(POCKET_RAW))
    raw["text_config"]["rope_scaling"].update(rope_type="longrope")
    with pytest.raises(
        ppexport.CheckpointError, match="rope_type is 'longrope', expected 'default' or 'yarn'"
    ):
        qwen3_vl.QWEN3_VL.parse(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5, expected 1.0"),
        ({"factor": 1e308}, r"factor 1e\+308 times 2048 tokens, expected at most"),
    ],
)
def test_rotary_settings_that_are_not_computed(change: dict[str, float], message: str) -> None:
    raw = json.loads(json.dumps(POCKET_RAW))
    raw["text_config"]["rope_scaling"].update({"rope_type": "yarn", "factor": 2.0, **change})
    with pytest.raises(ppexport.CheckpointError, match=message):
        qwen3_vl.QWEN3_VL.parse(raw)


def test_quantized_checkpoints_are_told_what_to_do(pocket: Path) -> None:
    edit(pocket, lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 4}))
    with pytest.raises(ppexport.CheckpointError, match=r"is quantized already \(awq\), .*--precision int4"):
        Checkpoint.open(pocket)


# ----------------------------------------------------------------------------------------------- preprocessing


def test_image_processor_inside_of_the_processor(pocket: Path) -> None:
    expected = preprocessing(pocket)
    inside = json.loads((pocket / "preprocessor_config.json").read_text(encoding="utf-8"))
    (pocket / "preprocessor_config.json").unlink()
    write_json(
        pocket / "processor_config.json", {"image_processor": inside, "processor_class": "Qwen3VLProcessor"}
    )
    assert preprocessing(pocket) == expected
    inside["image_mean"] = [0.1, 0.2, 0.3]
    write_json(pocket / "processor_config.json", {"image_processor": inside})
    assert preprocessing(pocket).mean == (0.1, 0.2, 0.3)
    edit(pocket, lambda c: c["image_processor"].update(patch_size=14), "processor_config.json")
    with pytest.raises(
        ppexport.CheckpointError, match=r"processor_config.json: image_processor: 'patch_size' is 14"
    ):
        preprocessing(pocket)


def test_image_processor_without_numbers_has_those_of_the_class(pocket: Path) -> None:
    """As transformers: the mean and standard deviation of CLIP, 3136 to 1003520 pixels."""
    write_json(pocket / "preprocessor_config.json", {"patch_size": 16})
    found = preprocessing(pocket)
    assert (found.min_pixels, found.max_pixels) == (3136, 1003520)
    assert found.mean == (0.48145466, 0.4578275, 0.40821073)


# ----------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("value", "precision"), usual_and_slow([(math.nan, "bf16")], [(-math.inf, "w8a8")]))
def test_weight_that_is_not_finite(value: float, precision: str, pocket: Path, tmp_path: Path) -> None:
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    edit_weights(pocket, lambda tensors: tensors[name].view(-1)[7:9].fill_(value))
    message = rf"model.safetensors: '{name}' holds 2 of 98304 values that are not finite .*expected numbers"
    with pytest.raises(ppexport.CheckpointError, match=message):
        build(pocket, tmp_path / "out", precision=precision)
    assert not (tmp_path / "out").exists()


def test_large_weights_are_not_taken_for_infinite(pocket: Path) -> None:
    """Their sum is infinite, they are not."""
    name = "model.language_model.norm.weight"
    edit_weights(pocket, lambda tensors: tensors[name].fill_(3e38))
    checkpoint = Checkpoint.open(pocket)
    table = qwen3_vl.QWEN3_VL.weights(checkpoint.config)["language"]
    assert bool(torch.isfinite(checkpoint.read(table["norm.weight"])).all())


def test_buffers_of_old_versions_are_ignored(pocket: Path) -> None:
    names = (
        "model.language_model.rotary_emb.inv_freq",
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.visual.rotary_pos_emb.inv_freq",
        "model.visual.embeddings.position_ids",
    )
    edit_weights(pocket, lambda tensors: tensors.update({name: torch.zeros(3) for name in names}))
    assert not set(names) & set(Checkpoint.open(pocket).entries)


def test_names_of_older_versions_are_read(pocket: Path, tmp_path: Path) -> None:
    expected = build(pocket, tmp_path / "expected")

    def older(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            renamed = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            tensors[renamed] = tensors.pop(name)
        assert "visual.patch_embed.proj.weight" in tensors
        assert "model.embed_tokens.weight" in tensors

    edit_weights(pocket, older)
    found = build(pocket, tmp_path / "found")
    for name in ("vision.onnx.data", "language.onnx.data"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_one_tensor_under_two_names(pocket: Path) -> None:
    edit_weights(pocket, lambda t: t.update({"model.norm.weight": torch.zeros(192)}))
    with pytest.raises(
        ppexport.CheckpointError, match=r"are both 'model.language_model.norm.weight', expected one"
    ):
        Checkpoint.open(pocket)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"base_model.model.{name}",
        lambda name: f"{name.removesuffix('.weight')}.lora_A.weight",
        lambda name: f"{name.removesuffix('.weight')}.base_layer.weight",
        lambda name: "model.language_model.embed_tokens.modules_to_save.default.weight",
    ],
)
def test_adapters_are_told_what_to_do(rename: Callable[[str], str], pocket: Path) -> None:
    edit_weights(
        pocket,
        lambda t: t.update({rename("model.language_model.layers.0.self_attn.q_proj.weight"): t.popitem()[1]}),
    )
    with pytest.raises(
        ppexport.CheckpointError, match=r"holds '.*': found an adapter \(LoRA\) .*merge_and_unload"
    ):
        Checkpoint.open(pocket)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_names_of_wrappers_are_told_what_to_do(wrapper: str, pocket: Path) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[wrapper + name] = tensors.pop(name)

    edit_weights(pocket, wrap)
    with pytest.raises(
        ppexport.CheckpointError, match=f"expected names without '{wrapper}' in front; save the model"
    ):
        Checkpoint.open(pocket)


def test_weights_beyond_bfloat16(pocket: Path, tmp_path: Path) -> None:
    name = "model.language_model.layers.1.mlp.up_proj.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].float()
        tensors[name].view(-1)[3] = 3.4e38

    edit_weights(pocket, widen)
    with pytest.raises(
        ppexport.CheckpointError, match=f"'{name}' does not fit bfloat16; build with --precision fp32"
    ):
        build(pocket, tmp_path / "out", precision="bf16")


def test_a_folder_with_an_adapter_only(pocket: Path) -> None:
    (pocket / "config.json").rename(pocket / "adapter_config.json")
    with pytest.raises(ppexport.CheckpointError, match=r"found an adapter \(LoRA\) that is not merged"):
        Checkpoint.open(pocket)


def head(config: ModelConfig) -> str:
    return "table" if config.text.tied_head else "stored"


@pytest.mark.parametrize(
    ("version", "top", "text", "stored", "expected"),
    [
        ("5.23.0", True, None, None, "table"),
        ("5.23.0", True, None, "equal", "table"),
        ("5.23.0", True, None, "other", "stored"),
        ("5.23.0", None, True, "other", "stored"),
        ("5.23.0", False, None, "other", "stored"),
        ("4.57.6", None, True, None, "table"),
        ("4.57.6", None, True, "equal", "table"),
        ("4.57.6", None, True, "other", "transformers 4, which wrote this, ignores it"),
        ("4.57.6", True, True, "other", "transformers 4, which wrote this, ignores it"),
        (
            "5.23.0",
            None,
            True,
            None,
            "lacks weights .*lm_head.weight'; .*set tie_word_embeddings to true at the top",
        ),
    ],
)
def test_output_head(
    version: str, top: bool | None, text: bool | None, stored: str | None, expected: str, pocket: Path
) -> None:
    """What transformers does with the versions that wrote it; where two of them disagree, it is refused."""

    def change(config: dict[str, Any]) -> None:
        config["transformers_version"] = version
        for section, value in ((config, top), (config["text_config"], text)):
            section.pop("tie_word_embeddings", None)
            if value is not None:
                section["tie_word_embeddings"] = value

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors["model.language_model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table.clone() if stored == "equal" else table + 0.5

    edit(pocket, change)
    if stored:
        edit_weights(pocket, add_head)
    if expected not in ("table", "stored"):
        with pytest.raises(ppexport.CheckpointError, match=expected):
            Checkpoint.open(pocket)
        return
    checkpoint = Checkpoint.open(pocket)
    assert head(checkpoint.config) == expected
    if version.startswith("5."):
        theirs = Qwen3VLForConditionalGeneration.from_pretrained(pocket, dtype=torch.float32)
        tied = theirs.lm_head.weight.data_ptr() == theirs.model.language_model.embed_tokens.weight.data_ptr()
        assert tied == (expected == "table")
    assert any("the stored one is used" in notice for notice in checkpoint.notices) == (
        bool(top) and stored == "other"
    )


# ------------------------------------------------------------------------------------------------ odd but legal


@pytest.mark.parametrize("width", [12])
def test_head_width_that_the_attention_of_onnxruntime_does_not_take(width: int, tmp_path: Path) -> None:
    """Refused where it would fail in every run; the way out that is named works."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": width,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [width // 2 - 4, 2, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 56, "num_heads": 4, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0], "out_hidden_size": 48,
        },
        image_token_id=90, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    message = rf"head_dim is {width}, expected a multiple of 8 .*build it with --dialect plain"
    with pytest.raises(ppexport.CheckpointError, match=message):
        build(tmp_path / "checkpoint", tmp_path / "bundle")
    pipe = ppexport.load(build(tmp_path / "checkpoint", tmp_path / "bundle", dialect="plain"))
    (step,) = pipe.generate_tokens([5, 6, 7], max_new_tokens=1)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].numpy()
    np.testing.assert_allclose(step.logits, expected, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 16), (16, 16)])
def test_pictures_of_one_patch_without_merging(size: tuple[int, int], tmp_path: Path) -> None:
    """spatial_merge_size 1: a side of one patch has position 0, not 0 / 0."""
    raw = json.loads(json.dumps(POCKET_RAW))
    raw["vision_config"].update(spatial_merge_size=1)
    config = Qwen3VLConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    pipe = ppexport.load(build(tmp_path / "checkpoint", tmp_path / "bundle"), min_pixels=1)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    pre = pipe.manifest.preprocessing
    pixels = (image / 255 - np.array(pre.mean)) / np.array(pre.std)
    rows, cols = size[0] // 16, size[1] // 16
    patches = pixels.reshape(rows, 16, cols, 16, 3).transpose(0, 2, 4, 1, 3).reshape(rows * cols, 3, 1, 256)
    patches = np.repeat(patches, 2, axis=2).reshape(rows * cols, -1).astype(np.float32)
    with torch.no_grad():
        found = model.model.visual(torch.from_numpy(patches), grid_thw=torch.tensor([[1, rows, cols]]))
    expected = found.pooler_output if hasattr(found, "pooler_output") else found[0]
    np.testing.assert_allclose(pipe.encode(image, prune=None).embeds, expected.numpy(), atol=1e-3)
