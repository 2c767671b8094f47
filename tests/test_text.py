"""Prompts, chat templates and incremental text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ppexport
from ppexport.models.bytelevel import IDS, byte_tokenizer
from ppexport.runtime.text import Text, TextStream

PAD = IDS["<|image_pad|>"]


@pytest.fixture
def text(tiny_bundle: Path) -> Text:
    return Text(tiny_bundle, PAD)


def test_prompt_equals_transformers(text: Text, tiny_checkpoint: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is 5 < 6 & ü漢?"}]},
    ]
    template = (tiny_checkpoint / "chat_template.jinja").read_text()
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert text.encode(messages, [1]).tolist() == expected


def test_placeholders_are_expanded_per_image(text: Text) -> None:
    ids = text.encode("hi", [3, 5])
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], ids == PAD, [0]]).astype(int))))[::2]
    assert runs.tolist() == [3, 5]
    assert ids.dtype == np.int32


def test_streamed_text_equals_whole_text() -> None:
    tokenizer = byte_tokenizer()
    words = "naïve 漢字 🙂👍🏽 end"
    ids = tokenizer.encode(words).ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == words
    assert all("�" not in piece for piece in pieces)
    assert "" in pieces  # bytes inside a character give nothing yet


def test_unfinished_character_comes_out_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a漢").ids[:-1]
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == ["a", "", ""]
    assert set(stream.finish()) == {"�"}


def test_special_tokens_are_left_out() -> None:
    stream = TextStream(byte_tokenizer())
    assert stream.push(IDS["<|im_end|>"]) == ""
    assert stream.finish() == ""


def test_template_is_sandboxed(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ppexport.RequestError, match="the chat template refused the prompt: access to attribute"):
        Text(bundle, PAD).encode("hi", [])


def test_template_features_of_transformers(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text(
        "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    )
    made = Text(bundle, PAD)
    rendered = made.tokenizer.decode(made.encode([{"role": "a<b", "content": "é"}] * 2, []).tolist())
    assert json.loads(rendered) == {"role": "a<b", "content": "é"}
    (bundle / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(ppexport.RequestError, match="no system role"):
        Text(bundle, PAD).encode("hi", [])


def test_placeholder_in_the_question_is_refused(text: Text) -> None:
    with pytest.raises(ppexport.RequestError, match=r"holds 2 image placeholders, expected 1.*read as a placeholder"):
        text.encode("what is <|image_pad|>?", [4])


def test_messages_without_an_image_part(tiny_pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    with pytest.raises(ppexport.RequestError, match="holds 0 image placeholders, expected 1"):
        tiny_pipe.generate([{"role": "user", "content": "hi"}], [screen])


@pytest.mark.parametrize("prompt", [7, [{"text": "hi"}], None])
def test_wrong_prompt(text: Text, prompt: object) -> None:
    with pytest.raises(ppexport.RequestError, match=r"^the prompt is .*, expected a string or a list of messages"):
        text.encode(prompt, [])  # type: ignore[arg-type]


def test_answer_streams_and_ends_with_statistics(tiny_pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    answer = tiny_pipe.generate("What?", [screen, screen], max_new_tokens=10)
    assert answer.stats.generated_tokens == 0  # nothing has run yet
    pieces = list(answer)
    stats = answer.stats
    assert answer.text() == "".join(pieces)
    assert stats.generated_tokens == 10
    assert stats.finish == "length"
    assert [image.total for image in stats.images] == [20, 20]
    assert 0 < stats.kept < stats.total == 40
    assert set(stats.milliseconds) == {"image", "prune", "reuse", "text", "vision", "prefill", "decode"}
    assert stats.ttft == pytest.approx(sum(stats.milliseconds.values()) - stats.milliseconds["decode"])
