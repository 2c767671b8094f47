"""The synthetic screens, the scoring of answers, and the trainer's bookkeeping."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import lessons
import numpy as np
import pytest
import torch
import train
from network import LOOKS
from terminal import runner

import ppexport
from ppexport import eval as evaluation
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.exporters.lowering import ops
from ppexport.workloads.canvas import Sample
from ppexport.workloads.score import edit_distance, score
from ppexport.workloads.screens import HELD_OUT, OFF, ON, SKILLS, sample


@pytest.mark.parametrize("skill", SKILLS)
def test_samples_are_repeatable_and_differ(skill: str) -> None:
    first, again, other = sample(skill, 5), sample(skill, 5), sample(skill, 6)
    assert (first.question, first.answer) == (again.question, again.answer)
    assert first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("skill", SKILLS)
def test_what_is_asked_is_on_the_screen(skill: str) -> None:
    for seed in range(60):
        made = sample(skill, seed)
        width, height = made.image.size
        assert 160 <= width <= 640
        assert 96 <= height <= 480
        for element in made.elements:
            left, top, right, bottom = element.box
            assert 0 <= left < right <= width + 1
            assert 0 <= top < bottom
            assert top < height
        if skill == "read":
            assert made.answer in [e.text for e in made.elements if f"What is the {e.name}?" == made.question]
        elif skill == "yesno":
            assert made.answer in ("yes", "no")
        elif skill == "locate":
            assert score(made, made.answer) == 1
        else:
            assert 0 < len(made.answer) <= 160


def test_the_same_name_is_not_asked_twice() -> None:
    """A question has one answer: names of elements of the asked kind are unique on a screen."""
    for seed in range(100):
        for skill in ("read", "yesno", "locate"):
            made = sample(skill, seed)
            names = [
                e.name
                for e in made.elements
                if e.kind == {"read": "value", "yesno": "option"}.get(skill, "button")
            ]
            assert len(names) == len(set(names)), (skill, seed, names)


def test_sizes_themes_and_kept_share_vary_as_promised() -> None:
    made = [sample(SKILLS[i % 4], HELD_OUT + i) for i in range(200)]
    aligned = [s.image.width % 32 == 0 and s.image.height % 32 == 0 for s in made]
    assert 0.3 < np.mean(aligned) < 0.7
    dark = [np.asarray(s.image).mean() < 100 for s in made]
    assert 0.1 < np.mean(dark) < 0.6
    shares = [ppexport.select(s.image, min_pixels=lessons.MIN_PIXELS).share for s in made]
    low, middle, high = np.percentile(shares, [5, 50, 90])
    assert low > 0.1
    assert 0.2 < middle < 0.45
    assert high < 0.62


def test_screens_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ppexport.workloads.screens", "--skill", "read", "--seed", "7"]
    done = subprocess.run([*command, "-o", tmp_path / "o.png"], capture_output=True, text=True, check=True)
    made = sample("read", 7)
    assert json.loads(done.stdout) == {"question": made.question, "answer": made.answer, "box": None}
    assert (tmp_path / "o.png").stat().st_size > 500


def test_edit_distance() -> None:
    for a, b, distance in (("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("ab", "ba", 2)):
        assert edit_distance(a, b) == edit_distance(b, a) == distance


def with_skill(skill: str, check: Callable[[Sample], bool]) -> Sample:
    return next(s for s in (sample(skill, i) for i in range(50)) if check(s))


def test_scores() -> None:
    read = sample("read", 1)
    assert score(read, read.answer) == 1
    assert score(read, read.answer + "x") == 0
    text = with_skill("transcribe", lambda s: len(s.answer) > 20)
    assert score(text, text.answer) == 1
    assert score(text, text.answer[:-5]) == pytest.approx(1 - 5 / len(text.answer))
    assert score(text, "q" * 500) == 0
    click = sample("locate", 1)
    for wrong in ("[999, 999]", "", "[1]", "[1, 2, 3]"):
        assert score(click, wrong) == 0


def test_intervals() -> None:
    low, high = evaluation._wilson(0.9, 200)
    assert low == pytest.approx(0.8507, abs=2e-3)
    assert high == pytest.approx(0.9342, abs=2e-3)
    low, high = evaluation._bootstrap([1.0, 1.0], [3, 5])
    assert 0.3 < low < 0.4
    assert high == pytest.approx(1.0)


def test_eval_command(tiny_bundle: Path) -> None:
    arguments = [
        "eval",
        str(tiny_bundle),
        "-n",
        "2",
        "--skills",
        "read,yesno",
        "--no-prune",
        "--tau",
        "0",
        "--json",
    ]
    result = runner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["results"]
    assert [(r["skill"], r["setting"]) for r in found] == [
        ("read", "off"),
        ("yesno", "off"),
        ("read", "pred_2d tau 0"),
        ("yesno", "pred_2d tau 0"),
    ]
    assert found[0]["kept_share"] == 1
    assert found[2]["kept_share"] < 0.7
    assert len(found[0]["answers"]) == 2
    result = runner().invoke(main, ["eval", str(tiny_bundle), "--skills", "dance"])
    assert result.exit_code == 1
    assert "skill is 'dance', expected one of: read" in result.output


def test_trainer_saves_what_the_bundle_computes(tmp_path: Path) -> None:
    """A training batch in torch and the exported bundle give the same first token distribution."""
    torch.manual_seed(1)
    model = train.Pocket(train.qwen3_vl.QWEN3_VL.parse(train.pocket_config())).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as saved
    train.save_checkpoint(model, tmp_path / "checkpoint")
    assert Checkpoint.open(tmp_path / "checkpoint").config.text.layers == 6
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoint").iterdir())
    assert size < 12e6
    pipe = ppexport.load(build(tmp_path / "checkpoint", tmp_path / "bundle"))
    made = sample("read", 3)
    for pruned_share, prune in ((1.0, ppexport.PixelPrune()), (0.0, None)):
        item = lessons.Reader(pruned_share).item(made, Random(0))
        with torch.no_grad():
            loss, *_ = model([item, item])
        assert pipe.text is not None
        prompt = pipe.text.encode(made.question, [pipe.encode(made.image, prune).selection.total])
        answer = item.targets[item.targets >= 0]
        losses = []
        for i in range(len(answer)):
            ids = np.concatenate([prompt, answer[:i]])
            logits = next(pipe.generate_tokens(ids, [made.image], prune)).logits.astype(np.float64)
            losses.append(np.log(np.exp(logits).sum()) - logits[answer[i]])
        assert loss.item() == pytest.approx(np.mean(losses), rel=1e-3)


def test_characters_lie_in_their_blocks() -> None:
    made = with_skill("transcribe", lambda s: s.image.width % 32 == 0 and s.image.height % 32 == 0)
    item = lessons.Reader(0.0).item(made, Random(0))
    found = [chr(c) for c in item.cells.reshape(-1) if c]
    drawn = [c for _, _, c in made.characters]
    assert 0.8 * len(drawn) < len(found) <= len(drawn)  # two narrow ones may share a half of a patch
    assert set(found) <= set(drawn)


def test_where_to_look_is_where_the_answer_is() -> None:
    """Of a value its text, of a button the button, of an option its mark; as image tokens of the prompt."""
    for skill in ("read", "locate", "yesno"):
        for seed in range(30):
            made = sample(skill, seed)
            assert made.look is not None
            left, top, right, bottom = made.look
            inside = {c for x, y, c in made.characters if left <= x <= right and top <= y <= bottom}
            if skill == "yesno":
                assert inside == {ON if made.answer == "yes" else OFF}
            else:
                assert set(made.answer if skill == "read" else made.question[6:]) - {" "} <= inside
    made = with_skill("read", lambda s: s.image.width % 32 == 0 and s.image.height % 32 == 0)
    reader = lessons.Reader(0.0)
    item = reader.item(made, Random(0))
    positions, seen = item.looks[0]
    first = int(np.flatnonzero(item.ids == lessons.IDS["<|image_pad|>"])[0])
    row, col = np.divmod(seen - first, made.image.width // 32)
    left, top, right, bottom = made.look  # type: ignore[misc]
    assert (row.min(), row.max()) == (top // 32, (bottom - 1) // 32)
    assert (col.min(), col.max()) == (left // 32, (right - 1) // 32)
    assert reader.tokenizer.decode(list(item.targets[positions])) == made.answer


def test_looking_loss_is_the_attention_that_the_decoder_pays() -> None:
    torch.manual_seed(2)
    model = train.Pocket(train.qwen3_vl.QWEN3_VL.parse(train.pocket_config())).eval()
    item = lessons.Reader(0.0).item(sample("read", 3), Random(0))
    with torch.no_grad():
        _, _, found, _ = model([item])
        expected = []
        for index, head in LOOKS.items():
            layer, (x, cos, sin, *_) = model.decoder.layers[index], model.inputs[index]
            h, c = layer.norm1(x), layer.c
            q, k = (
                ops.rotary(norm(part(h).reshape(1, -1, heads, c.head_dim)), cos, sin)[0]
                for part, heads, norm in (
                    (layer.q, c.heads, layer.q_norm),
                    (layer.k, c.kv_heads, layer.k_norm),
                )
            )
            scores = q[:, head] @ k[:, head * c.kv_heads // c.heads].t() * c.head_dim**-0.5
            share = torch.softmax(scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf), 1)
            positions, seen = (torch.from_numpy(v) for v in item.looks[0])
            expected.append(-share[positions][:, seen].sum(1).log().mean())
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
