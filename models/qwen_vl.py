"""What the Qwen-VL families have in common: views, positions, the decoder's configuration and names of weights.

Source: transformers ``models/qwen2_vl``, ``models/qwen2_5_vl`` and ``models/qwen3_vl`` (4.57 and 5.x write the same
architectures with slightly different keys).
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

# Buffers that old versions of transformers saved: the graphs calculate them.
BUFFERS = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq)$|(^|\.)position_ids$")
HEAD = "lm_head.weight"
VISION = "model.visual"  # where the weights of the tower lie
LONGEST = 1 << 30  # tokens of a sequence; positions are int32

# The turns of a conversation; used where a checkpoint has a tokenizer but no chat template.
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Table = dict[str, Weight]


class QwenVL:
    """The common part of a family; see family.Family. A family adds the class attributes and the tower."""

    model_type: str
    known_as: str  # the family in models/known_keys.json whose keys it has
    preprocessing: Preprocessing
    chat_template: str
    sections: Sequence[int]  # mRoPE, where the configuration does not say
    interleaved: bool  # are they?
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
        top = Reader(raw, "config.json", told, defaults_of(self.known_as, "config.json"), harmless)
        text_section = self.text_section(top, harmless)
        text_section.get("tie_word_embeddings", bool, None)
        text = self.parse_text(text_section, self.is_tied(top, text_section.raw))
        text_eos = _end_tokens(text_section)
        text_section.finish()
        section = top.section("vision_config", defaults_of(self.known_as, "vision_config"), harmless)
        vision = self.parse_vision(section)
        _check_vision(section, vision)
        section.finish()
        if vision.out_width != text.width:
            top.fail(
                f"the vision tower gives features of width {vision.out_width}, expected the decoder's {text.width}"
            )
        if len(vision.deepstack) > text.layers:
            top.fail(
                f"{len(vision.deepstack)} deepstack levels, expected at most {text.layers} (the decoder's layers)"
            )
        model = ModelConfig(
            family=self.model_type,
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

    def text_section(self, top: Reader, harmless: Sequence[str]) -> Reader:
        """The decoder's configuration, which lies in a section of its own."""
        return top.section("text_config", defaults_of(self.known_as, "text_config"), harmless)

    def is_tied(self, top: Reader, text: Mapping[str, Any]) -> bool:
        """Is the output head the embedding table?

        transformers 5 asks the whole model's configuration, 4 that of its text part (and wrote both alike). What is
        said for the text part only therefore counts in files that 4 has written.
        """
        tied = top.get("tie_word_embeddings", bool, None)
        if tied is not None:
            return bool(tied)
        written_by = top.get("transformers_version", str, None) or ""
        return written_by.startswith("4.") and text.get("tie_word_embeddings") is True

    def parse_text(self, r: Reader, tied: bool) -> TextConfig:
        """The decoder's numbers."""
        raise NotImplementedError

    def parse_vision(self, r: Reader) -> VisionConfig:
        """The tower's numbers."""
        raise NotImplementedError

    def vision_weights(self, c: VisionConfig) -> Table:
        """Initializer of the vision graph -> where it lies."""
        raise NotImplementedError

    def weights(self, model: ModelConfig) -> dict[str, Table]:
        """See family.Family."""
        return {"vision": self.vision_weights(model.vision), "language": _text_weights(model.text)}

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

    def vision_numbers(self, r: Reader, **own: Any) -> VisionConfig:
        """The numbers that all towers have, with a family's ``own``."""
        r.expect("in_channels", 3)
        depth = r.get("depth", int)
        heads = r.get("num_heads", int)
        r.expect("num_hidden_layers", depth, default=depth)  # other names of the two
        r.expect("num_attention_heads", heads, default=heads)
        return VisionConfig(
            depth=depth,
            heads=heads,
            patch=r.side("patch_size"),
            merge=r.get("spatial_merge_size", int),
            temporal_patch=r.side("temporal_patch_size"),
            rope_theta=r.axial_rope_theta(),
            **own,
        )

    def text_numbers(self, r: Reader, tied: bool, head_dim: int, qkv_bias: bool, qk_norm: bool) -> TextConfig:
        """The numbers that all decoders have, the rotary ones among them."""
        r.expect("hidden_act", "silu")
        context = r.get("max_position_embeddings", int)
        rope = r.decoder_rope()
        sections = rope.integers("mrope_section", list(self.sections))
        if len(sections) != 3 or min(sections) < 1:
            rope.fail(f"mrope_section is {sections!r}, expected three positive integers")
        rope.expect("partial_rotary_factor", 1.0, default=1.0)
        if self.interleaved:
            rope.expect("mrope_interleaved", True, default=True)
        yarn = _parse_yarn(rope, context)
        heads = r.get("num_attention_heads", int)
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
                sections=sections,
                width=head_dim,
                interleaved=self.interleaved,
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
        if 2 * sum(sections) != head_dim:
            r.fail(
                f"mrope_section {list(sections)}, expected a sum of half the head's width, {head_dim // 2}"
            )
        return config


def _end_tokens(r: Reader) -> tuple[int, ...]:
    """The end-of-sequence tokens that a section names, or that transformers' class has where it names none."""
    default = None if "eos_token_id" in r.raw else (r.defaults or {}).get("eos_token_id")
    found = r.get("eos_token_id", (int, list), default, at_least=0)
    if found is None:
        return ()
    return r.integers("eos_token_id") if isinstance(found, list) else (found,)


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


def patch_embedding(table: Table, c: VisionConfig) -> None:
    """Enter what makes vectors of patches."""
    kernel = (c.width, c.channels, c.temporal_patch, c.patch, c.patch)
    table["patch_embed.weight"] = Weight(f"{VISION}.patch_embed.proj.weight", kernel, "patch")
    if c.patch_bias:
        table["patch_embed.bias"] = Weight(f"{VISION}.patch_embed.proj.bias", (c.width,))


def block_attention(table: Table, c: VisionConfig, i: int) -> None:
    """Enter norms and attention of block ``i`` of the tower."""
    source = f"{VISION}.blocks.{i}"
    name = f"blocks.{i}"
    norm(table, f"{name}.norm1", f"{source}.norm1", c.width, c.norm)
    linear(table, f"{name}.qkv", f"{source}.attn.qkv", c.width, 3 * c.width)
    linear(table, f"{name}.proj", f"{source}.attn.proj", c.width, c.width)
    norm(table, f"{name}.norm2", f"{source}.norm2", c.width, c.norm)


def merger(table: Table, c: VisionConfig) -> None:
    """Enter the merger of Qwen2-VL and Qwen2.5-VL."""
    merged = c.width * c.merge**2
    norm(table, "merger.norm", f"{VISION}.merger.ln_q", c.width, c.norm)
    linear(table, "merger.fc1", f"{VISION}.merger.mlp.0", merged, merged)
    linear(table, "merger.fc2", f"{VISION}.merger.mlp.2", merged, c.out_width)


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


def _check_vision(r: Reader, c: VisionConfig) -> None:
    if c.width % c.heads or c.head_dim % 4:
        r.fail(f"hidden_size {c.width} over {c.heads} heads, expected a head width that is a multiple of 4")
    if round(c.positions**0.5) ** 2 != c.positions:
        r.fail(f"num_position_embeddings {c.positions}, expected a square number")
    for key, blocks in (("deepstack_visual_indexes", c.deepstack), ("fullatt_block_indexes", c.full_blocks)):
        if list(blocks) != sorted(set(blocks)) or any(n >= c.depth for n in blocks):
            r.fail(f"{key} {list(blocks)}, expected rising block numbers under {c.depth}")


def _text_weights(c: TextConfig) -> Table:
    root = "model.language_model"
    table = {"token_table": Weight(f"{root}.embed_tokens.weight", (c.vocab, c.width))}
    for i in range(c.layers):
        source = f"{root}.layers.{i}"
        name = f"layers.{i}"
        norm(table, f"{name}.norm1", f"{source}.input_layernorm", c.width, "rms")
        norm(table, f"{name}.norm2", f"{source}.post_attention_layernorm", c.width, "rms")
        attention = f"{source}.self_attn"
        for part, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
            linear(
                table, f"{name}.{part}", f"{attention}.{part}_proj", c.width, heads * c.head_dim, c.qkv_bias
            )
        linear(table, f"{name}.o", f"{attention}.o_proj", c.heads * c.head_dim, c.width, bias=False)
        if c.qk_norm:
            norm(table, f"{name}.q_norm", f"{attention}.q_norm", c.head_dim, "rms")
            norm(table, f"{name}.k_norm", f"{attention}.k_norm", c.head_dim, "rms")
        linear(table, f"{name}.gate", f"{source}.mlp.gate_proj", c.width, c.ffn, bias=False)
        linear(table, f"{name}.up", f"{source}.mlp.up_proj", c.width, c.ffn, bias=False)
        linear(table, f"{name}.down", f"{source}.mlp.down_proj", c.ffn, c.width, bias=False)
    norm(table, "norm", f"{root}.norm", c.width, "rms")
    if not c.tied_head:
        table["head"] = Weight(HEAD, (c.vocab, c.width))
    return table
