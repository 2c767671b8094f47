"""The trained checkpoint in models/pocket: what it is, what transformers computes with it, what it answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import ppexport
from ppexport.build_bundle import build
from ppexport.eval import evaluate
from ppexport.models.bytelevel import IDS
from ppexport.workloads.screens import HELD_OUT, sample

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "models" / "pocket"
SCREEN = ROOT / "docs" / "settings.png"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> ppexport.Pipeline:
    return ppexport.load(build(POCKET, tmp_path_factory.mktemp("pocket") / "bundle"))


def test_checkpoint_is_small_and_complete() -> None:
    files = [p for p in POCKET.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")]
    assert {p.name for p in files} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(p.stat().st_size for p in files) < 12e6
    training = (POCKET / "TRAINING.md").read_text(encoding="utf-8")
    assert "python examples/train_pocket/train.py" in training


@pytest.mark.parametrize(("skill", "seed"), [("transcribe", 2), ("read", 5), ("locate", 3)])
def test_parity_with_transformers(skill: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Unpruned in float32, from the picture file to 32 greedy tokens."""
    torch.set_num_threads(2)
    made = sample(skill, HELD_OUT + seed)
    model = AutoModelForImageTextToText.from_pretrained(POCKET, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    batch = Qwen2VLImageProcessorPil.from_pretrained(POCKET)([made.image], return_tensors="pt")
    count = int(batch["image_grid_thw"].prod()) // 4
    content = [{"type": "image"}, {"type": "text", "text": made.question}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")[
        "input_ids"
    ]
    model.generation_config.eos_token_id = None
    expected = model.generate(
        input_ids=ids,
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        mm_token_type_ids=(ids == IDS["<|image_pad|>"]).int(),
        max_new_tokens=32,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    wide = ppexport.load(build(POCKET, tmp_path_factory.mktemp("pocket") / "fp32", precision="fp32"))
    wide.manifest = dataclasses.replace(
        wide.manifest, stop_tokens=()
    )  # both go on behind the end of the answer
    steps = list(wide.generate_tokens(ids[0].numpy(), [made.image], None, max_new_tokens=32))
    logits = np.stack([step.logits for step in steps])
    assert np.abs(logits - torch.cat(expected.logits).numpy()).max() < 1e-3
    assert [step.token for step in steps] == expected.sequences[0, ids.shape[1] :].tolist()
    assert wide.text is not None
    assert wide.text.encode(made.question, [count]).tolist() == ids[0].tolist()


@pytest.mark.parametrize("prune", [None, ppexport.PixelPrune()], ids=["unpruned", "pruned"])
def test_answers_about_the_screen_of_the_demo(
    pipe: ppexport.Pipeline, prune: ppexport.PixelPrune | None
) -> None:
    for question, answer in (("What is the Region?", "Porto"), ("What is the Brightness?", "46%")):
        assert pipe.generate(question, [Image.open(SCREEN)], prune).text() == answer


@pytest.mark.parametrize(
    ("skill", "floor"), [("read", 0.8), ("transcribe", 0.85), ("locate", 0.8), ("yesno", 0.8)]
)
def test_accuracy_floor(pipe: ppexport.Pipeline, skill: str, floor: float) -> None:
    """Ten held-out samples per skill, pruned at tau = 0; the figures on 200 are in docs/accuracy.md."""
    found = evaluate(pipe, skill, ppexport.PixelPrune(), 10)
    assert found.kept_share < 0.6
    assert found.accuracy >= floor, found.answers
