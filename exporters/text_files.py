"""What of a checkpoint is for its text: tokenizer, chat template, and the tokens that end an answer."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..models.errors import CheckpointError
from .checkpoint import Checkpoint

# special tokens that have a name in transformers
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def copy_text(checkpoint: Checkpoint, directory: Path) -> str:
    """Copy tokenizer.json and write chat_template.jinja; returns the bundle's interface, "text" or "tokens"."""
    tokenizer = checkpoint.path / "tokenizer.json"
    if not tokenizer.is_file():
        return "tokens"
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    template = chat_template(checkpoint) or checkpoint.family.chat_template
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return "text"


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The checkpoint's chat template, from wherever transformers keeps it."""
    file = checkpoint.path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise CheckpointError(f"{file.name} cannot be read: {err}") from err
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = (checkpoint.optional_json(name) or {}).get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next(
                (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"),
                None,
            )
        if isinstance(template, str):
            return template
    return None


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """What chat templates may ask for: "bos_token", "eos_token" and others that the tokenizer's configuration names.

    As transformers reads them: special_tokens_map.json counts where tokenizer_config.json has no added_tokens_decoder,
    and every further key that ends in "_token" and has a text names one, too.
    """
    config = checkpoint.optional_json("tokenizer_config.json") or {}
    legacy = {} if "added_tokens_decoder" in config else checkpoint.optional_json("special_tokens_map.json")
    own = config.get("extra_special_tokens")
    named = {**config, **(legacy or {}), **(own if isinstance(own, dict) else {})}
    found = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        asked = name in NAMED or (isinstance(own, dict) and name in own)
        if asked and text is not None and not isinstance(text, str):
            raise CheckpointError(f"tokenizer_config.json: {name} is {value!r:.80}, expected a token")
        if isinstance(text, str) and (asked or name.endswith("_token")):
            found[name] = text
    return found


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json; every one lies in the vocabulary."""
    raw = (checkpoint.optional_json("generation_config.json") or {}).get("eos_token_id")
    stop = [raw] if isinstance(raw, int) else raw or checkpoint.config.eos_tokens
    vocab = checkpoint.config.text.vocab
    if not isinstance(stop, (list, tuple)) or not all(type(n) is int and 0 <= n < vocab for n in stop):
        where = "generation_config.json" if raw else "config.json"
        raise CheckpointError(
            f"{where}: eos_token_id is {(raw or stop)!r:.80}, expected token ids under {vocab}"
        )
    return tuple(stop)


def text_notices(checkpoint: Checkpoint) -> list[str]:
    """What a user should know about the text of a checkpoint."""
    notices = []
    if not (checkpoint.path / "tokenizer.json").is_file():
        hint = ""
        if (checkpoint.path / "vocab.json").is_file():
            hint = " (vocab.json alone is not read; save the tokenizer with transformers to get a tokenizer.json)"
        notices.append(f"no tokenizer.json: the bundle takes token ids only{hint}")
    elif not chat_template(checkpoint):
        notices.append("no chat template: using the one of the family")
    if not stop_tokens(checkpoint):
        notices.append("no end-of-sequence token: answers end at their longest length only")
    if (checkpoint.optional_json("generation_config.json") or {}).get("do_sample"):
        notices.append(
            "generation_config.json asks for sampling: requests are greedy unless they ask for it too"
        )
    return notices
