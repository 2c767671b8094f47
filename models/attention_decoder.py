"""Decoders of attention layers, as the families with one configure and store them: Qwen, Llama, Mistral.

Source: transformers ``models/llama``, ``models/mistral``, ``models/qwen2`` and ``modeling_rope_utils``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .config import DeltaNet, Rope, TextConfig, Weight, Yarn
from .hfconfig import CLASS_DEFAULT, Reader

HEAD = "lm_head.weight"
ROOT = "model.language_model"  # where the weights of the decoder lie
LONGEST = 1 << 30  # tokens of a sequence; positions are int32

Table = dict[str, Weight]


def linear(table: Table, name: str, source: str, inner: int, outer: int, bias: bool = True) -> None:
    """Enter a linear layer."""
    table[f"{name}.weight"] = Weight(f"{source}.weight", (outer, inner), "transpose")
    if bias:
        table[f"{name}.bias"] = Weight(f"{source}.bias", (outer,))


def norm(table: Table, name: str, source: str, width: int, kind: str = "layer") -> None:
    """Enter a norm of a kind (VisionConfig.norm); "rms" has no bias."""
    table[f"{name}.weight"] = Weight(f"{source}.weight", (width,))
    if kind == "layer":
        table[f"{name}.bias"] = Weight(f"{source}.bias", (width,))


def decoder_weights(c: TextConfig) -> Table:
    """Initializer of the language graph -> where it lies."""
    table = {"token_table": Weight(f"{ROOT}.embed_tokens.weight", (c.vocab, c.width))}
    for i in range(c.layers):
        source = f"{ROOT}.layers.{i}"
        name = f"layers.{i}"
        _decoder_norm(table, c, f"{name}.norm1", f"{source}.input_layernorm", c.width)
        _decoder_norm(table, c, f"{name}.norm2", f"{source}.post_attention_layernorm", c.width)
        if c.delta is not None and i in c.delta.layers:
            _delta_net(table, c, c.delta, name, f"{source}.linear_attn")
        else:
            _attention(table, c, name, f"{source}.self_attn")
        linear(table, f"{name}.gate", f"{source}.mlp.gate_proj", c.width, c.ffn, bias=False)
        linear(table, f"{name}.up", f"{source}.mlp.up_proj", c.width, c.ffn, bias=False)
        linear(table, f"{name}.down", f"{source}.mlp.down_proj", c.ffn, c.width, bias=False)
    _decoder_norm(table, c, "norm", f"{ROOT}.norm", c.width)
    if not c.tied_head:
        table["head"] = Weight(HEAD, (c.vocab, c.width))
    return table


def _decoder_norm(table: Table, c: TextConfig, name: str, source: str, width: int) -> None:
    table[f"{name}.weight"] = Weight(f"{source}.weight", (width,), "one_plus" if c.norm_offset else "same")


def _attention(table: Table, c: TextConfig, name: str, source: str) -> None:
    queries = c.heads * (2 if c.gated else 1)  # and gates, head by head
    for part, heads in (("q", queries), ("k", c.kv_heads), ("v", c.kv_heads)):
        linear(table, f"{name}.{part}", f"{source}.{part}_proj", c.width, heads * c.head_dim, c.qkv_bias)
    linear(table, f"{name}.o", f"{source}.o_proj", c.heads * c.head_dim, c.width, bias=False)
    if c.qk_norm:
        _decoder_norm(table, c, f"{name}.q_norm", f"{source}.q_norm", c.head_dim)
        _decoder_norm(table, c, f"{name}.k_norm", f"{source}.k_norm", c.head_dim)


def _delta_net(table: Table, c: TextConfig, d: DeltaNet, name: str, source: str) -> None:
    values = d.value_heads * d.value_dim
    for part, outer in (("qkv", d.channels), ("z", values), ("b", d.value_heads), ("a", d.value_heads)):
        linear(table, f"{name}.{part}", f"{source}.in_proj_{part}", c.width, outer, bias=False)
    for part in "ab":  # a few columns, exponents of which add up over the whole sequence
        table[f"{name}.{part}.weight"] = replace(table[f"{name}.{part}.weight"], integers=False)
    table[f"{name}.conv"] = Weight(f"{source}.conv1d.weight", (d.channels, 1, d.kernel))
    table[f"{name}.dt_bias"] = Weight(f"{source}.dt_bias", (d.value_heads,))
    table[f"{name}.log_decay"] = Weight(f"{source}.A_log", (d.value_heads,))
    norm(table, f"{name}.gated_norm", f"{source}.norm", d.value_dim, "rms")
    linear(table, f"{name}.o", f"{source}.out_proj", values, c.width, bias=False)


def is_tied(top: Reader, text: Mapping[str, Any]) -> bool:
    """Is the output head the embedding table?

    transformers 5 asks the whole model's configuration, 4 that of its text part (and wrote both alike). What is said
    for the text part only therefore counts in files that 4 has written.
    """
    tied = top.get("tie_word_embeddings", bool, None)
    if tied is not None:
        return bool(tied)
    written_by = top.get("transformers_version", str, None) or ""
    return written_by.startswith("4.") and text.get("tie_word_embeddings") is True


def end_tokens(r: Reader) -> tuple[int, ...]:
    """The end-of-sequence tokens that a section names, or that transformers' class has where it names none."""
    default = None if "eos_token_id" in r.raw else (r.defaults or {}).get("eos_token_id")
    found = r.get("eos_token_id", (int, list), default, at_least=0)
    if found is None:
        return ()
    return r.integers("eos_token_id") if isinstance(found, list) else (found,)


def refuse_sliding_window(r: Reader, layers: int) -> None:
    """Raise CheckpointError where a configuration of Qwen2 lets a layer see less than all tokens."""
    windowed = r.get("use_sliding_window", bool, False)
    windowed = windowed and ("sliding_window" not in r.raw or r.raw["sliding_window"] is not None)
    r.get("sliding_window", int, None)
    first = r.get("max_window_layers", int, at_least=0)
    if windowed and first < layers:
        r.fail(
            f"use_sliding_window is true for layers from {first} on, expected false: every layer sees all tokens"
        )


def decoder_numbers(
    r: Reader,
    tied: bool,
    head_dim: int,
    qkv_bias: bool,
    qk_norm: bool,
    mrope: Sequence[int] | None = None,
    interleaved: bool = False,
    turned: float = 1.0,
) -> TextConfig:
    """The numbers that all decoders have, the rotary ones among them.

    ``mrope``: the sections of several axes, where the configuration does not say; None for a single axis. ``turned``:
    the share of a head that is, where the configuration does not say; only 1 for decoders that turn all of it.
    """
    r.expect("hidden_act", "silu")
    context = r.get("max_position_embeddings", int)
    rope = r.decoder_rope()
    if head_dim % 2:
        r.fail(f"heads are {head_dim} wide, expected an even number, halves of which are turned")
    width = _turned_width(r, rope, head_dim, turned)
    sections: tuple[int, ...] = (width // 2,)
    if mrope is not None:
        sections = rope.integers("mrope_section", list(mrope))
        if len(sections) != 3 or min(sections) < 1:
            rope.fail(f"mrope_section is {sections!r}, expected three positive integers")
        if interleaved:
            rope.expect("mrope_interleaved", True, default=True)
    yarn = _yarn(rope, context)
    heads = r.get("num_attention_heads", int)
    each_head_its_own = "num_key_value_heads" in r.raw  # as null; absent is the class's number
    each_head_its_own |= (r.defaults or {}).get("num_key_value_heads") is None
    config = TextConfig(
        layers=r.get("num_hidden_layers", int),
        width=r.get("hidden_size", int),
        ffn=r.get("intermediate_size", int),
        heads=heads,
        kv_heads=r.get("num_key_value_heads", int, heads if each_head_its_own else CLASS_DEFAULT),
        head_dim=head_dim,
        vocab=r.get("vocab_size", int),
        norm_eps=r.get("rms_norm_eps", float),
        rope=Rope(
            theta=rope.get("rope_theta", float),
            sections=sections,
            width=width,
            interleaved=interleaved,
            yarn=yarn,
        ),
        context=context if yarn is None else max(context, int(yarn.factor * yarn.original_context)),
        tied_head=tied,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )
    rope.finish()
    if config.heads % config.kv_heads:
        r.fail(
            f"{config.heads} attention heads, expected a multiple of the {config.kv_heads} key/value heads"
        )
    if 2 * sum(sections) != width:
        part = "the head's width" if width == head_dim else "the width that is turned"
        r.fail(f"mrope_section {list(sections)}, expected a sum of half {part}, {width // 2}")
    return config


def _turned_width(r: Reader, rope: Reader, head_dim: int, turned: float) -> int:
    """How many values of a head are turned."""
    beside = r.get("partial_rotary_factor", float, turned)
    share = rope.get("partial_rotary_factor", float, beside)
    if turned == 1.0 and share != 1.0:
        rope.fail(f"'partial_rotary_factor' is {share}, expected 1.0: other values are not supported")
    width = int(head_dim * share)
    if width % 2 or not 0 < width <= head_dim:
        rope.fail(
            f"partial_rotary_factor {share} of heads {head_dim} wide, expected an even number, at most all of them"
        )
    return width


def _yarn(rope: Reader, context: int) -> Yarn | None:
    """The rotary settings of YaRN, or None for those of the training. Raises CheckpointError for other kinds.

    Source: transformers ``modeling_rope_utils._compute_yarn_parameters``.
    """
    kind = rope.get("rope_type", str, rope.raw.get("type", "default"))
    if kind in ("default", "mrope"):  # "mrope" is the name that old files have
        return None
    if kind != "yarn":
        rope.fail(f"rope_type is {kind!r}, expected 'default' or 'yarn'")
    original = rope.get("original_max_position_embeddings", int, context)
    factor = rope.get("factor", float, context / original)
    if factor * original > LONGEST:
        rope.fail(f"factor {factor:g} times {original} tokens, expected at most {LONGEST}")
    scale = rope.get("mscale", float, None)
    scale_all = rope.get("mscale_all_dim", float, None)

    def attention(times: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0

    inferred = attention(scale) / attention(scale_all) if scale and scale_all else attention(1.0)
    return Yarn(
        factor=factor,
        original_context=original,
        attention_factor=rope.get("attention_factor", float, inferred),
        beta_fast=rope.get("beta_fast", float, 32.0),
        beta_slow=rope.get("beta_slow", float, 1.0),
        truncate=rope.get("truncate", bool, True),
    )
