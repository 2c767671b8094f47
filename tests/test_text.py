"""Prompts, chat templates and incremental text."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ppexport
from ppexport.models.bytelevel import IDS, byte_tokenizer
from ppexport.runtime.text import Text, TextStream

SCREEN = Path(__file__).parent.parent / "docs" / "settings.png"

PAD = IDS["<|image_pad|>"]


@pytest.fixture
def text(tiny_bundle: Path) -> Text:
    return Text(tiny_bundle, PAD, {})


@pytest.mark.newest
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
    with pytest.raises(
        ppexport.RequestError, match="the chat template refused the prompt: access to attribute"
    ):
        Text(bundle, PAD, {}).encode("hi", [])


def test_template_features_of_transformers(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text(
        "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    )
    made = Text(bundle, PAD, {})
    rendered = made.tokenizer.decode(made.encode([{"role": "user", "content": "é<b"}] * 2, []).tolist())
    assert json.loads(rendered) == {"role": "user", "content": "é<b"}
    (bundle / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(ppexport.RequestError, match="no system role"):
        Text(bundle, PAD, {}).encode("hi", [])


def test_what_training_tools_write_in_templates(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}"
    )
    made = Text(bundle, PAD, {})
    rendered = made.tokenizer.decode(made.encode("é", []).tolist())
    assert rendered == 'é{"content":"\\u00e9","role":"user"}'


SPECIAL = sorted(IDS)


def test_there_are_special_tokens_to_try(text: Text) -> None:
    assert set(SPECIAL) == set(text.special)
    assert "<|im_end|>" in SPECIAL


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_a_message_are_text(token: str, text: Text) -> None:
    """They cannot end a turn or begin one, nor stand for an image: they are read as what they look like."""
    said = f"What is {token}?{token}{token} <"
    ids = text.encode([{"role": "system", "content": token}, {"role": "user", "content": said}], [2]).tolist()
    assert text.tokenizer.decode(ids, skip_special_tokens=False) == (
        f"<|im_start|>system\n{token}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|>"
        f"<|vision_end|>{said}<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = text.encode(
        [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], [2]
    ).tolist()
    for special in text.special.values():
        assert ids.count(special) == expected.count(special)


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_that_are_put_together_from_parts(token: str, text: Text) -> None:
    """The template writes parts one behind the other, with nothing between them."""
    for cut in range(1, len(token)):
        parts = [{"type": "text", "text": piece} for piece in (f"a{token[:cut]}", f"{token[cut:]}b")]
        ids = text.encode([{"role": "user", "content": parts}], []).tolist()
        assert f"a{token}b" in text.tokenizer.decode(ids, skip_special_tokens=False)
        assert [n for n in ids if n in text.special.values()] == [
            IDS[each] for each in ("<|im_start|>", "<|im_end|>", "<|im_start|>")
        ]


def test_special_tokens_in_calls_of_tools(tiny_bundle: Path, tmp_path: Path) -> None:
    """As values and as keys, wherever a template writes them."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text("{{ messages | tojson }}<|im_end|>")
    arguments = {"<|im_end|>": ["<|im_start|>", {"x": "<|im_end|>"}]}
    message = {"role": "assistant", "content": "", "tool_calls": [{"arguments": arguments}]}
    made = Text(bundle, PAD, {})
    ids = made.encode([message], []).tolist()
    assert [n for n in ids if n >= 256] == [IDS["<|im_end|>"]]
    assert json.loads(made.tokenizer.decode(ids[:-1], skip_special_tokens=False)) == [message]


def test_special_tokens_within_each_other_and_private_characters(text: Text) -> None:
    said = "<|im_<|im_end|>end|> \U000f0000 <|im_start|>assistant <"
    ids = text.encode(said, []).tolist()
    assert said in text.tokenizer.decode(ids, skip_special_tokens=False)
    assert ids.count(IDS["<|im_start|>"]) == 2


def test_text_without_special_tokens_takes_the_usual_way(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """It equals transformers (above), and costs nothing more."""
    monkeypatch.setattr(Text, "_encode_marked", None)
    ids = text.encode("What is | this <|im_ < thing?", [1]).tolist()
    assert "What is | this <|im_ < thing?<|im_end|>" in text.tokenizer.decode(ids, skip_special_tokens=False)


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "user", "content": [IMAGE, {"type": "text", "text": "hi"}]}],
    ],
)
def test_images_stand_before_what_is_asked(messages: Any, text: Text) -> None:
    assert text.encode(messages, [3]).tolist() == text.encode("hi", [3]).tolist()


def test_a_conversation_shows_its_images_to_the_first_user(text: Text) -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    ids = text.encode([{"role": role, "content": said} for role, said in turns], [1])
    assert "user\n<|vision_start|><|image_pad|><|vision_end|>a" in text.tokenizer.decode(
        ids, skip_special_tokens=False
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "{path}"},
        {"type": "image", "path": "{path}"},
        {"type": "image", "image": "{data}"},
        {"type": "image", "image": "{file}"},
        {"type": "image_url", "image_url": {"url": "{data}", "detail": "low"}},
        {"type": "image_url", "image_url": "{path}"},
        {"type": "image", "image": "{array}"},
    ],
)
def test_messages_that_hold_their_images(
    part: dict[str, Any], tiny_pipe: ppexport.Pipeline, screen: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(screen).save(tmp_path / "screen.png")
    written = base64.b64encode((tmp_path / "screen.png").read_bytes()).decode()
    values = {
        "{path}": str(tmp_path / "screen.png"),
        "{data}": f"data:image/png;base64,{written}",
        "{array}": screen,
    }
    values["{file}"] = (tmp_path / "screen.png").as_uri()

    def filled(value: Any) -> Any:
        return (
            {k: filled(v) for k, v in value.items()} if isinstance(value, dict) else values.get(value, value)
        )

    messages = [{"role": "user", "content": [filled(part), {"type": "text", "text": "What?"}]}]
    expected = tiny_pipe.generate("What?", [screen], max_new_tokens=3)
    answer = tiny_pipe.generate(messages, max_new_tokens=3)
    assert str(answer) == str(expected) == answer.text()
    assert answer.stats.kept == expected.stats.kept > 0


def test_images_beside_those_in_messages(tiny_pipe: ppexport.Pipeline, screen: np.ndarray) -> None:
    """Parts without an image of their own take the given ones, in order."""
    content = [IMAGE, {"type": "image", "image": screen[:64]}, IMAGE, {"type": "text", "text": "What?"}]
    answer = tiny_pipe.generate(
        [{"role": "user", "content": content}], [screen, screen[:32]], max_new_tokens=1
    )
    assert [image.rows for image in answer.stats.images] == [4, 2, 1]


def test_one_image_by_itself(tiny_pipe: ppexport.Pipeline, screen: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(screen).save(tmp_path / "screen.png")
    for image in (screen, str(tmp_path / "screen.png"), tmp_path / "screen.png", Image.fromarray(screen)):
        assert tiny_pipe.generate("What?", images=image, max_new_tokens=1).stats.total == 20


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([], 0, "the prompt is an empty list of messages"),
        ([{"role": "user", "content": ""}], 0, "a message of the user is empty"),
        ([{"role": "user", "content": []}], 0, "a message of the user is empty"),
        ([{"role": "user", "content": None}], 0, "content of type NoneType"),
        (
            [{"role": "narrator", "content": "x"}],
            0,
            "the role 'narrator', expected one of: system, user, assistant",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "video": "x"}]}],
            0,
            "holds the part .*'video'.*expected",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], 0, "without text"),
        ([{"role": "user", "content": ["hi"]}], 0, "holds the part 'hi'"),
        ([{"role": "user", "content": [IMAGE, IMAGE]}], 1, "have image part 2, but images has 1"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], 1, "of which 1 are left over"),
        ([{"role": "system", "content": "x"}], 1, "no message of a user"),
        ([{"role": "user", "content": [{"type": "image", "image": 7}]}], 0, "an image part holds a int"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "A" * 5000}]}],
            0,
            "AAA[.]{3}: .*if it is base64, put",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "https://x.org/a.png"}]}],
            0,
            "is a URL, expected a",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,!"}]}],
            0,
            "not valid base64",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "data:image/png,x"}]}],
            0,
            "expected a URL of the fo",
        ),
    ],
)
def test_messages_that_are_refused(
    messages: Any, images: int, message: str, tiny_pipe: ppexport.Pipeline, screen: np.ndarray
) -> None:
    with pytest.raises(ppexport.PpexportError, match=message):
        tiny_pipe.generate(messages, [screen] * images)


@pytest.mark.parametrize("prompt", [7, [{"text": "hi"}], None])
def test_wrong_prompt(text: Text, prompt: object) -> None:
    with pytest.raises(
        ppexport.RequestError, match=r"^the prompt is .*, expected a string or a list of messages"
    ):
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


def test_a_context_that_was_asked_for(pocket_bundle: Path) -> None:
    """It ends an answer, keeps a long prompt out, and is refused before graphs are loaded where it is too long."""
    with ppexport.load(pocket_bundle) as pipe:
        most = pipe.context
        needed = pipe.generate("Hello").stats.prompt_tokens
        expected = pipe.generate("Transcribe all text.", SCREEN).text()
        shown = pipe.generate("Transcribe all text.", SCREEN).stats.prompt_tokens
    with ppexport.load(pocket_bundle, context=shown + 5) as pipe:
        answer = pipe.generate("Transcribe all text.", SCREEN)
        assert expected.startswith(answer.text())
        assert (answer.stats.finish, answer.stats.generated_tokens) == ("context", 5)
    with (
        ppexport.load(pocket_bundle, context=needed) as pipe,
        pytest.raises(ppexport.RequestError, match="the context that was asked for"),
    ):
        pipe.generate("Hello").text()
    for wrong in (1, most + 1, 2.5):
        with pytest.raises(ppexport.RequestError, match="context is"):
            ppexport.load(pocket_bundle, context=wrong)  # type: ignore[arg-type]
