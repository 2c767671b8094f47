"""The exported graphs of every family against the installed transformers, stage by stage, on small random models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pruned_reference
import pytest
import torch
from conftest import usual_and_slow
from invariants import relative_error
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import ppexport
from ppexport.build_bundle import build
from ppexport.models.families import FAMILIES

IMAGE, START, END = 90, 91, 92


@dataclass(frozen=True)
class Variant:
    family: str  # model_type
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool
    sizes: tuple[tuple[int, int], ...]  # (height, width) of the images, in merged tokens; of LLaVA in pixels
    more: dict[str, Any] = field(default_factory=dict)  # of the configuration


TEXT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
TEXT3 = TEXT | {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}
TEXT2 = TEXT | {
    "hidden_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
VISION3 = {
    "depth": 4,
    "hidden_size": 32,
    "out_hidden_size": 48,
    "intermediate_size": 56,
    "num_heads": 4,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}
VISION2 = {"depth": 3, "embed_dim": 40, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 3}
VISION25 = {
    "depth": 4,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 54,
    "num_heads": 4,
    "fullatt_block_indexes": [1, 3],
}
VARIANTS = {
    "qwen2": Variant("qwen2_vl", TEXT2, VISION2, True, ((2, 3), (5, 1))),
    "qwen2_one_kv_head": Variant(
        "qwen2_vl",
        TEXT2 | {"num_key_value_heads": 1, "num_hidden_layers": 2},
        VISION2 | {"num_heads": 5, "mlp_ratio": 4},
        False,
        ((3, 7),),
    ),
    # less than a window, whole ones, parts of some at both borders
    "qwen2_5": Variant("qwen2_5_vl", TEXT2, VISION25, False, ((2, 3), (8, 4), (9, 6))),
    "qwen2_5_small_windows": Variant(
        "qwen2_5_vl", TEXT2, VISION25 | {"window_size": 56, "fullatt_block_indexes": [2]}, True, ((5, 7),)
    ),
    "qwen3_tied_two_levels": Variant("qwen3_vl", TEXT3, VISION3, True, ((2, 3), (5, 1))),
    "qwen3_untied_three_levels": Variant(
        "qwen3_vl",
        {**TEXT3, "num_key_value_heads": 4, "num_hidden_layers": 4},
        {**VISION3, "deepstack_visual_indexes": [0, 1, 3], "num_heads": 2},
        False,
        ((3, 7),),
    ),
    "qwen3_one_kv_head_one_level": Variant(
        "qwen3_vl",
        {
            **TEXT3,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "rope_parameters": TEXT3["rope_parameters"] | {"mrope_section": [6, 3, 3]},
        },
        {**VISION3, "deepstack_visual_indexes": [3], "num_position_embeddings": 81},
        True,
        ((1, 1), (9, 2)),
    ),
    "qwen3_no_deepstack": Variant(
        "qwen3_vl", TEXT3, {**VISION3, "depth": 2, "deepstack_visual_indexes": []}, False, ((4, 4),)
    ),
}
TEXT35 = TEXT | {
    "num_hidden_layers": 5,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
    },
}
VISION35 = {key: value for key, value in VISION3.items() if key != "deepstack_visual_indexes"}
VARIANTS |= {
    "qwen3_5": Variant("qwen3_5", TEXT35, VISION35, True, ((2, 3), (5, 1))),
    "qwen3_5_other_layers": Variant(
        "qwen3_5",
        TEXT35
        | {
            "linear_num_value_heads": 2,
            "linear_conv_kernel_dim": 3,
            "layer_types": [f"{kind}_attention" for kind in ("full", "linear", "full", "linear", "linear")],
        },
        VISION35 | {"depth": 2},
        False,
        ((3, 7),),
    ),
}
LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "hidden_size": 64,
    "eos_token_id": 2,
}
LLAMA |= {"intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "head_dim": 16}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4}
CLIP |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
# (height, width) in pixels: landscape, portrait and square, smaller and larger than a view
PICTURES = ((100, 150), (131, 40), (56, 56), (211, 210))
VARIANTS |= {
    "llava_vicuna": Variant("llava", LLAMA, CLIP, False, PICTURES),
    "llava_qwen2_gelu_last_layer": Variant(
        "llava", QWEN2, CLIP | {"hidden_act": "gelu"}, True, PICTURES[:1], {"vision_feature_layer": -1}
    ),
    "llava_next_mistral": Variant("llava_next", MISTRAL, CLIP, False, PICTURES),
    "llava_next_vicuna": Variant("llava_next", LLAMA, CLIP, False, PICTURES[:2], {"vision_feature_layer": 2}),
    "llava_next_qwen2": Variant("llava_next", QWEN2, CLIP, False, PICTURES[2:]),
}
USUAL = [
    "qwen2",
    "qwen2_5",
    "qwen3_tied_two_levels",
    "qwen3_no_deepstack",
    "qwen3_5",
    "llava_vicuna",
    "llava_next_mistral",
]
CLASSES = {  # of transformers
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
}


def test_every_family_is_held_against_transformers() -> None:
    assert {VARIANTS[name].family for name in USUAL} == set(CLASSES)
    assert set(FAMILIES) - set(CLASSES) == {"qwen3_5_text"}  # tests/test_text_only.py


PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


@dataclass(frozen=True)
class Case:
    model: PreTrainedModel
    pipe: ppexport.Pipeline
    images: list[np.ndarray]
    shown: dict[str, torch.Tensor]  # what the model's forward takes of them
    ids: np.ndarray
    processor: Any
    block: int
    family: str

    def inputs(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        tokens = torch.tensor(ids)[None]
        kinds = {"mm_token_type_ids": (tokens == IMAGE).int()} if self.family.startswith("qwen") else {}
        return {"input_ids": tokens, **self.shown, **kinds}


def processor_of(variant: Variant, patch: int) -> Any:
    """transformers' own, and what of a picture the model is told."""
    if variant.family == "llava":
        return LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    if variant.family == "llava_next":
        return LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=PINPOINTS,
        )
    pre = FAMILIES[variant.family].preprocessing
    return Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, do_resize=False, image_mean=pre.mean, image_std=pre.std
    )


@pytest.fixture(scope="module", params=usual_and_slow(USUAL, VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    variant = VARIANTS[request.param]
    config_class, model_class = CLASSES[variant.family]
    own: dict[str, Any] = {
        "image_token_id": IMAGE,
        "video_token_id": 93,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    if variant.family.startswith("llava"):
        own = {"image_token_index": IMAGE}
    if variant.family == "llava_next":
        own["image_grid_pinpoints"] = PINPOINTS
    config = config_class(
        text_config=variant.text,
        vision_config=variant.vision,
        tie_word_embeddings=variant.tied,
        **own,
        **variant.more,
    )
    torch.manual_seed(7)
    model = model_class(config).eval()
    for parameter in model.parameters():  # larger than the default, so that every term shows
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory / "checkpoint")
    bundle = build(directory / "checkpoint", directory / "bundle")
    rng = np.random.default_rng(3)
    patch = config.vision_config.patch_size
    block = patch * getattr(config.vision_config, "spatial_merge_size", 1)
    unit = 1 if variant.family.startswith("llava") else block
    images = [rng.integers(0, 256, (unit * h, unit * w, 3), np.uint8) for h, w in variant.sizes]
    processor = processor_of(variant, patch)
    shown = dict(processor(images, return_tensors="pt"))
    pipe = ppexport.load(bundle, min_pixels=None if unit == 1 else block**2)
    ids = [5, 6, 7]
    for image in images:
        ids += [START, *[IMAGE] * pipe.pixels(image)[1].placeholders, END, 11]
    return Case(model, pipe, images, shown, np.array([*ids, 20, 21, 22]), processor, block, variant.family)


def reference_logits(case: Case, ids: np.ndarray) -> np.ndarray:
    """float32 logits [S, V] of a full forward pass without cache."""
    with torch.no_grad():
        return case.model(**case.inputs(ids), use_cache=False).logits[0].numpy()


def test_vision_and_deepstack(case: Case) -> None:
    """What the decoder gets of each image, in its order."""
    with torch.no_grad():
        expected = case.model.model.get_image_features(return_dict=True, **case.shown)
    prompt = case.pipe.prepare_tokens(case.ids, case.images, None).prompt
    encoded = [case.pipe.encode(image, None) for image in case.images]
    features = np.concatenate([each.features for each in encoded], axis=1)
    taken = features[:, prompt.feature_rows[prompt.feature_rows >= 0]]
    assert relative_error(taken[0], torch.cat(tuple(expected.pooler_output)).numpy()) < 1e-4
    levels = getattr(expected, "deepstack_features", None) or []
    assert encoded[0].deepstack.shape[0] == len(levels)
    for mine, level in zip(taken[1:], levels, strict=True):
        assert relative_error(mine, torch.cat(tuple(level)).numpy()) < 1e-4


def test_prefill_logits(case: Case) -> None:
    step = next(case.pipe.generate_tokens(case.ids, case.images, None))
    assert relative_error(step.logits, reference_logits(case, case.ids)[-1]) < 1e-4


def test_decode_with_cache(case: Case) -> None:
    """Greedy decoding against transformers' own cached generation (which may emit the placeholder token as text)."""
    steps = list(case.pipe.generate_tokens(case.ids, case.images, None, max_new_tokens=8))
    case.model.generation_config.eos_token_id = None
    expected = case.model.generate(
        **case.inputs(case.ids),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert relative_error(np.stack([s.logits for s in steps]), torch.cat(expected.logits).numpy()) < 1e-4
    assert [step.token for step in steps] == expected.sequences[0, len(case.ids) :].tolist()


def test_text_only_prompt(case: Case) -> None:
    ids = np.array([5, 6, 7, 20])
    with torch.no_grad():
        expected = case.model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0, -1].numpy()
    step = next(case.pipe.generate_tokens(ids))
    assert relative_error(step.logits, expected) < 1e-4


def mostly_flat(block: int, rows: int, columns: int, seed: int) -> np.ndarray:
    """A picture of which a few places show something, and windows of four by four tokens nothing at all."""
    rng = np.random.default_rng(seed)
    picture = np.full((rows * block, columns * block, 3), 200, np.uint8)
    for _ in range(7):
        row, column = rng.integers(0, rows), rng.integers(columns // 2, columns)
        picture[row * block : (row + 1) * block, column * block : (column + 1) * block] = rng.integers(
            0, 256, (block, block, 3)
        )
    return picture


def test_pruned(case: Case) -> None:
    """Features, logits and greedy tokens of what is kept, against transformers' layers run on those patches alone."""
    if case.family.startswith("llava"):
        pytest.skip("of CLIP: tests/test_llava.py")
    pictures = [mostly_flat(case.block, 9, 10, 1), mostly_flat(case.block, 5, 6, 2)]
    encoded = [case.pipe.encode(picture) for picture in pictures]
    keeps = [each.keep for each in encoded]
    assert [0 < len(keep) < total // 2 for keep, total in zip(keeps, (90, 30), strict=True)] == [True, True]
    batch = case.processor(pictures, return_tensors="pt")
    grid = batch["image_grid_thw"]
    sizes = [int(g.prod()) for g in grid]
    shown = [
        pruned_reference.features(case.model, values, g[None], keep)
        for values, g, keep in zip(batch["pixel_values"].split(sizes), grid, keeps, strict=True)
    ]
    for mine, levels in zip(encoded, shown, strict=True):
        assert relative_error(mine.features, torch.stack(levels).numpy()) < 1e-4
    ids = np.array([5, START, *[IMAGE] * 90, END, 6, START, *[IMAGE] * 30, END, 20, 21])
    steps = list(case.pipe.generate_tokens(ids, pictures, max_new_tokens=6, stop=()))
    tokens = [step.token for step in steps]
    expected = pruned_reference.logits(case.model, ids, IMAGE, grid, keeps, shown, tokens[:-1])
    assert expected.argmax(1).tolist() == tokens
    assert relative_error(np.stack([step.logits for step in steps]), expected) < 1e-4
