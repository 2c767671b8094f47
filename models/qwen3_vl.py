"""Qwen3-VL (Hugging Face ``model_type`` "qwen3_vl"): its configuration keys, weight names and defaults.

Source: transformers ``models/qwen3_vl`` (4.57 and 5.x write the same architecture with slightly different keys).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .config import ModelConfig, Preprocessing, Rope, TextConfig, VisionConfig, Weight, Yarn
from .family import Kept, Prompt, View, Views
from .hfconfig import CLASS_DEFAULT, HARMLESS, Reader, defaults_of, known_keys
from .layout import lay_out, on_grid
from .resize import smart_resize

MODEL_TYPE = "qwen3_vl"

# Buffers that old versions of transformers saved: the graphs calculate them.
BUFFERS = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq)$|(^|\.)position_ids$")
HEAD = "lm_head.weight"
LONGEST = 1 << 30  # tokens of a sequence; positions are int32

# Used where the checkpoint has no image processor configuration; the values of Qwen/Qwen3-VL-*-Instruct.
PREPROCESSING = Preprocessing(
    min_pixels=65536, max_pixels=16777216, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)

# Used where the checkpoint has a tokenizer but no chat template.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Qwen3VL:
    """The family; see family.Family."""

    model_type = MODEL_TYPE
    preprocessing = PREPROCESSING
    chat_template = CHAT_TEMPLATE
    head = HEAD

    def parse(self, raw: Mapping[str, Any], notices: list[str] | None = None) -> ModelConfig:
        """See family.Family."""
        ignored = (
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            *known_keys()["generation"],
        )
        harmless = [*HARMLESS, *ignored]
        told = [] if notices is None else notices
        top = Reader(raw, "config.json", told, defaults_of(MODEL_TYPE, "config.json"), harmless)
        text_section = top.section("text_config", defaults_of(MODEL_TYPE, "text_config"), harmless)
        text, text_eos = _parse_text(text_section, _is_tied(top))
        vision = _parse_vision(
            top.section("vision_config", defaults_of(MODEL_TYPE, "vision_config"), harmless)
        )
        if vision.out_width != text.width:
            top.fail(
                f"vision_config.out_hidden_size is {vision.out_width}, expected text hidden_size {text.width}"
            )
        if len(vision.deepstack) > text.layers:
            top.fail(
                f"{len(vision.deepstack)} deepstack levels, expected at most {text.layers} (the decoder's layers)"
            )
        model = ModelConfig(
            family=MODEL_TYPE,
            tower="qwen_vit",
            decoder="attention",
            vision=vision,
            text=text,
            states=text.caches(),
            image_token=top.get("image_token_id", int, at_least=0),
            eos_tokens=_end_tokens(top) or text_eos,
        )
        if model.image_token >= text.vocab:
            top.fail(f"image_token_id is {model.image_token}, expected under the vocabulary's {text.vocab}")
        top.finish()
        return model

    def weights(self, model: ModelConfig) -> dict[str, dict[str, Weight]]:
        """See family.Family."""
        return {"vision": _vision_weights(model.vision), "language": _text_weights(model.text)}

    def canonical_name(self, stored: str) -> str | None:
        """See family.Family. Checkpoints of older versions hold ``visual.*`` and ``model.layers.*``."""
        if BUFFERS.search(stored):
            return None
        if stored.startswith("visual."):
            return f"model.{stored}"
        if stored.startswith("model.") and not stored.startswith(("model.visual.", "model.language_model.")):
            return f"model.language_model.{stored.removeprefix('model.')}"
        return stored

    def views(self, model: ModelConfig, height: int, width: int, limits: tuple[int, int]) -> Views:
        """See family.Family; the whole image is one view."""
        block = model.vision.block
        H, W = smart_resize(height, width, block, *limits)
        return Views(H, W, (View((0, 0, H, W), (H // block, W // block)),))

    def layout(self, model: ModelConfig, ids: np.ndarray, kept: Sequence[Kept]) -> Prompt:
        """See family.Family."""
        return lay_out(ids, model.image_token, kept, model.axes, on_grid)

    def tower_inputs(self, model: ModelConfig, view: View, keep: np.ndarray) -> dict[str, np.ndarray]:
        """See family.Family; the tower takes nothing else."""
        return {}


QWEN3_VL = Qwen3VL()


def _is_tied(top: Reader) -> bool:
    """Is the output head the embedding table?

    transformers 5 asks the whole model's configuration, 4 that of its text part (and wrote both alike). What is said
    for the text part only therefore counts in files that 4 has written.
    """
    tied = top.get("tie_word_embeddings", bool, None)
    if tied is not None:
        return bool(tied)
    written_by = top.get("transformers_version", str, None) or ""
    text = top.raw.get("text_config")
    return (
        written_by.startswith("4.") and isinstance(text, Mapping) and text.get("tie_word_embeddings") is True
    )


def _end_tokens(r: Reader) -> tuple[int, ...]:
    """The end-of-sequence tokens that a section names."""
    found = r.get("eos_token_id", (int, list), None, at_least=0)
    if found is None:
        return ()
    return r.integers("eos_token_id") if isinstance(found, list) else (found,)


def _parse_text(r: Reader, tied: bool) -> tuple[TextConfig, tuple[int, ...]]:
    """The decoder's numbers and its end-of-sequence tokens."""
    r.expect("hidden_act", "silu")
    r.expect("attention_bias", False)
    r.get("tie_word_embeddings", bool, None)
    context = r.get("max_position_embeddings", int)
    rope = r.decoder_rope()
    section = rope.integers("mrope_section", [24, 20, 20])
    if len(section) != 3 or min(section) < 1:
        rope.fail(f"mrope_section is {section!r}, expected three positive integers")
    rope.expect("mrope_interleaved", True, default=True)
    rope.expect("partial_rotary_factor", 1.0, default=1.0)
    yarn = _parse_yarn(rope, context)
    heads = r.get("num_attention_heads", int)
    head_dim = r.get("head_dim", int)
    each_head_its_own = "num_key_value_heads" in r.raw  # as null; absent is the class's number
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
            sections=section,
            width=head_dim,
            interleaved=True,
            yarn=yarn,
        ),
        context=context if yarn is None else max(context, int(yarn.factor * yarn.original_context)),
        tied_head=tied,
    )
    rope.finish()
    if config.heads % config.kv_heads:
        r.fail(
            f"{config.heads} attention heads, expected a multiple of the {config.kv_heads} key/value heads"
        )
    if 2 * sum(section) != head_dim:
        r.fail(f"mrope_section {list(section)}, expected a sum of head_dim / 2 = {head_dim // 2}")
    end_tokens = _end_tokens(r)
    r.finish()
    return config, end_tokens


def _parse_yarn(rope: Reader, context: int) -> Yarn | None:
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


def _parse_vision(r: Reader) -> VisionConfig:
    r.expect("hidden_act", "gelu_pytorch_tanh")
    r.expect("in_channels", 3)
    theta = r.axial_rope_theta()
    depth = r.get("depth", int)
    heads = r.get("num_heads", int)
    r.expect("num_hidden_layers", depth, default=depth)  # other names of the two
    r.expect("num_attention_heads", heads, default=heads)
    config = VisionConfig(
        depth=depth,
        width=r.get("hidden_size", int),
        heads=heads,
        ffn=r.get("intermediate_size", int),
        patch=r.side("patch_size"),
        merge=r.get("spatial_merge_size", int),
        temporal_patch=r.side("temporal_patch_size"),
        positions=r.get("num_position_embeddings", int),
        out_width=r.get("out_hidden_size", int),
        deepstack=r.integers("deepstack_visual_indexes"),
        rope_theta=theta,
    )
    if config.width % config.heads or config.head_dim % 4:
        r.fail(
            f"hidden_size {config.width} over {config.heads} heads, expected a head width that is a multiple of 4"
        )
    if round(config.positions**0.5) ** 2 != config.positions:
        r.fail(f"num_position_embeddings {config.positions}, expected a square number")
    if list(config.deepstack) != sorted(set(config.deepstack)) or any(
        not 0 <= level < config.depth for level in config.deepstack
    ):
        r.fail(
            f"deepstack_visual_indexes {list(config.deepstack)}, expected rising block numbers under {config.depth}"
        )
    r.finish()
    return config


def _linear(
    table: dict[str, Weight], name: str, source: str, inner: int, outer: int, bias: bool = True
) -> None:
    table[f"{name}.weight"] = Weight(f"{source}.weight", (outer, inner), "transpose")
    if bias:
        table[f"{name}.bias"] = Weight(f"{source}.bias", (outer,))


def _norm(table: dict[str, Weight], name: str, source: str, width: int) -> None:
    table[f"{name}.weight"] = Weight(f"{source}.weight", (width,))
    table[f"{name}.bias"] = Weight(f"{source}.bias", (width,))


def _merger(table: dict[str, Weight], name: str, source: str, c: VisionConfig, norm_width: int) -> None:
    merged = c.width * c.merge**2
    _norm(table, f"{name}.norm", f"{source}.norm", norm_width)
    _linear(table, f"{name}.fc1", f"{source}.linear_fc1", merged, merged)
    _linear(table, f"{name}.fc2", f"{source}.linear_fc2", merged, c.out_width)


def _vision_weights(c: VisionConfig) -> dict[str, Weight]:
    root = "model.visual"
    kernel = (c.width, c.channels, c.temporal_patch, c.patch, c.patch)
    table = {
        "patch_embed.weight": Weight(f"{root}.patch_embed.proj.weight", kernel, "patch"),
        "patch_embed.bias": Weight(f"{root}.patch_embed.proj.bias", (c.width,)),
        "positions": Weight(f"{root}.pos_embed.weight", (c.positions, c.width)),
    }
    for i in range(c.depth):
        source = f"{root}.blocks.{i}"
        name = f"blocks.{i}"
        _norm(table, f"{name}.norm1", f"{source}.norm1", c.width)
        _linear(table, f"{name}.qkv", f"{source}.attn.qkv", c.width, 3 * c.width)
        _linear(table, f"{name}.proj", f"{source}.attn.proj", c.width, c.width)
        _norm(table, f"{name}.norm2", f"{source}.norm2", c.width)
        _linear(table, f"{name}.fc1", f"{source}.mlp.linear_fc1", c.width, c.ffn)
        _linear(table, f"{name}.fc2", f"{source}.mlp.linear_fc2", c.ffn, c.width)
    _merger(table, "merger", f"{root}.merger", c, c.width)
    for i in range(len(c.deepstack)):
        _merger(table, f"deepstack.{i}", f"{root}.deepstack_merger_list.{i}", c, c.width * c.merge**2)
    return table


def _text_weights(c: TextConfig) -> dict[str, Weight]:
    root = "model.language_model"
    table = {"token_table": Weight(f"{root}.embed_tokens.weight", (c.vocab, c.width))}
    for i in range(c.layers):
        source = f"{root}.layers.{i}"
        name = f"layers.{i}"
        table[f"{name}.norm1"] = Weight(f"{source}.input_layernorm.weight", (c.width,))
        table[f"{name}.norm2"] = Weight(f"{source}.post_attention_layernorm.weight", (c.width,))
        attention = f"{source}.self_attn"
        _linear(table, f"{name}.q", f"{attention}.q_proj", c.width, c.heads * c.head_dim, bias=False)
        _linear(table, f"{name}.k", f"{attention}.k_proj", c.width, c.kv_heads * c.head_dim, bias=False)
        _linear(table, f"{name}.v", f"{attention}.v_proj", c.width, c.kv_heads * c.head_dim, bias=False)
        _linear(table, f"{name}.o", f"{attention}.o_proj", c.heads * c.head_dim, c.width, bias=False)
        table[f"{name}.q_norm"] = Weight(f"{attention}.q_norm.weight", (c.head_dim,))
        table[f"{name}.k_norm"] = Weight(f"{attention}.k_norm.weight", (c.head_dim,))
        _linear(table, f"{name}.gate", f"{source}.mlp.gate_proj", c.width, c.ffn, bias=False)
        _linear(table, f"{name}.up", f"{source}.mlp.up_proj", c.width, c.ffn, bias=False)
        _linear(table, f"{name}.down", f"{source}.mlp.down_proj", c.ffn, c.width, bias=False)
    table["norm"] = Weight(f"{root}.norm.weight", (c.width,))
    if not c.tied_head:
        table["head"] = Weight("lm_head.weight", (c.vocab, c.width))
    return table
