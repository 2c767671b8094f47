"""Prompts of chat templates as they are published, against transformers: text and ids, special tokens included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_json
from tokenizers import AddedToken, processors

from ppexport.models.bytelevel import IDS, byte_tokenizer
from ppexport.models.families import FAMILIES
from ppexport.runtime.text import Text

pytestmark = pytest.mark.newest
transformers = pytest.importorskip("transformers", reason="what prompts are held against")

NAMED = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
# Kinds of templates that checkpoints are published with, written anew: default system prompt and counted pictures
# (Qwen2-VL, Qwen2.5-VL), tools (Qwen3-VL), a token for the beginning (Llama, Mistral), one after every answer (Vicuna).
TEMPLATES = {
    "counted pictures": (
        "{% set seen = namespace(value=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
        "{% set seen.value = seen.value + 1 %}{% if add_vision_id %}Picture {{ seen.value }}: {% endif %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "tools": (
        "{%- if tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.content is string %}{{- message.content }}{%- else %}"
        "{%- for part in message.content %}{%- if part.type == 'image' %}"
        "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}"
        "{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "begins with a token": (
        "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %} [assistant]{% endif %}"
    ),
    "ends every turn": (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|image_pad|>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}{% if unk_token is defined %}never{% endif %}"
    ),
    **{
        f"of {name}": family.chat_template.replace("<image>", "<|image_pad|>")
        for name, family in FAMILIES.items()
    },
}
MESSAGES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "What is 5 < 6 & ü漢?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Which region?\n"}]},
    ],
    [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Equal?"}],
        },
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ],
)


@pytest.fixture(scope="module", params=["plain", "puts a token in front"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that adds nothing, as Qwen's, or its beginning by itself, as Llama's."""
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    if request.param != "plain":
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    tokenizer.save(str(made / "tokenizer.json"))
    write_json(made / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED})
    return made


@pytest.mark.parametrize("messages", MESSAGES, ids=["text", "image", "turns"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_ids_equal_transformers(kind: str, messages: list[dict[str, Any]], directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATES[kind], encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "never" not in rendered
    # as ProcessorMixin.apply_chat_template does
    expected = tokenizer(rendered, add_special_tokens=not rendered.startswith(tokenizer.bos_token)).input_ids
    text = Text(directory, IDS["<|image_pad|>"], NAMED)
    images = rendered.count("<|image_pad|>")
    assert text.encode(messages, [1] * images).tolist() == expected


@pytest.mark.parametrize(
    ("config", "legacy"),
    [
        (
            {
                "bos_token": "<s>",
                "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
                "unk_token": None,
            },
            None,
        ),
        (
            {"bos_token": None, "pad_token": "<|endoftext|>"},
            {"bos_token": {"content": "<s>"}, "eos_token": "<s>"},
        ),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "<|im_end|>"}),
        ({"extra_special_tokens": {"image_token": "<|image_pad|>"}, "model_max_length": 5}, None),
        (
            {"image_token": "<|image_pad|>", "add_bos_token": False, "vision_bos_token": "<|vision_start|>"},
            None,
        ),
        ({}, None),
    ],
)
def test_special_tokens_are_those_of_transformers(
    config: dict[str, Any], legacy: dict[str, Any] | None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from ppexport.exporters.checkpoint import Checkpoint
    from ppexport.exporters.text_files import special_tokens

    made = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    write_json(made / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    if legacy is not None:
        write_json(made / "special_tokens_map.json", legacy)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(made).special_tokens_map
    assert special_tokens(Checkpoint.open(made)) == json.loads(json.dumps(theirs))
