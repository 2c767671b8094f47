"""Qwen3-VL (Hugging Face ``model_type`` "qwen3_vl"): its configuration keys, weight names and defaults.

Source: transformers ``models/qwen3_vl`` (4.57 and 5.x write the same architecture with slightly different keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig, Preprocessing, TextConfig, VisionConfig, Weight
from .hfconfig import Reader

MODEL_TYPE = "qwen3_vl"

# Used where the checkpoint has no preprocessor_config.json; the values of Qwen/Qwen3-VL-*-Instruct.
PREPROCESSING = Preprocessing(min_pixels=65536, max_pixels=16777216, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

# Used where the checkpoint has a tokenizer but no chat template.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a ``config.json`` of this family.

    Raises CheckpointError for a key that is missing, unknown or has a value that these graphs do not compute.
    """
    top = Reader(raw, "config.json")
    text = _parse_text(top.section("text_config"), top.get("tie_word_embeddings", bool, None))
    vision = _parse_vision(top.section("vision_config"))
    if vision.out_width != text[0].width:
        top.fail(f"vision_config.out_hidden_size is {vision.out_width}, expected text hidden_size {text[0].width}")
    if len(vision.deepstack) > text[0].layers:
        top.fail(f"{len(vision.deepstack)} deepstack levels, expected at most {text[0].layers} (the decoder's layers)")
    top.get("video_token_id", int, None, at_least=0)
    config = ModelConfig(
        family=MODEL_TYPE,
        vision=vision,
        text=text[0],
        image_token=top.get("image_token_id", int, at_least=0),
        vision_start=top.get("vision_start_token_id", int, at_least=0),
        vision_end=top.get("vision_end_token_id", int, at_least=0),
        eos_tokens=text[1],
    )
    if config.image_token >= config.text.vocab:
        top.fail(f"image_token_id is {config.image_token}, expected under the vocabulary's {config.text.vocab}")
    top.finish()
    return config


def _parse_text(r: Reader, tied: bool | None) -> tuple[TextConfig, tuple[int, ...]]:
    """The decoder's numbers and its end-of-sequence tokens."""
    r.expect("hidden_act", "silu")
    r.expect("attention_bias", False, default=False)
    rope = r.rope_parameters()
    width, heads = r.get("hidden_size", int), r.get("num_attention_heads", int)
    text_tied = r.get("tie_word_embeddings", bool, None)
    eos = r.get("eos_token_id", (int, list), None)
    if isinstance(eos, list):
        eos = r.integers("eos_token_id")
    config = TextConfig(
        layers=r.get("num_hidden_layers", int),
        width=width,
        ffn=r.get("intermediate_size", int),
        heads=heads,
        kv_heads=r.get("num_key_value_heads", int, heads),
        head_dim=r.get("head_dim", int, width // heads),
        vocab=r.get("vocab_size", int),
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope_theta=float(rope["rope_theta"]),
        mrope_section=rope["mrope_section"],
        context=r.get("max_position_embeddings", int),
        tied_head=bool(tied if tied is not None else text_tied),
    )
    if config.heads % config.kv_heads:
        r.fail(f"{config.heads} attention heads, expected a multiple of the {config.kv_heads} key/value heads")
    if 2 * sum(config.mrope_section) != config.head_dim:
        r.fail(f"mrope_section {list(config.mrope_section)}, expected a sum of head_dim / 2 = {config.head_dim // 2}")
    r.finish()
    return config, eos if isinstance(eos, tuple) else () if eos is None else (eos,)


def _parse_vision(r: Reader) -> VisionConfig:
    r.expect("hidden_act", "gelu_pytorch_tanh")
    r.expect("in_channels", 3, default=3)
    theta = r.axial_rope_theta()
    config = VisionConfig(
        depth=r.get("depth", int),
        width=r.get("hidden_size", int),
        heads=r.get("num_heads", int),
        ffn=r.get("intermediate_size", int),
        patch=r.get("patch_size", int),
        merge=r.get("spatial_merge_size", int),
        temporal_patch=r.get("temporal_patch_size", int),
        positions=r.get("num_position_embeddings", int),
        out_width=r.get("out_hidden_size", int),
        deepstack=r.integers("deepstack_visual_indexes"),
        rope_theta=theta,
    )
    if config.width % config.heads or config.head_dim % 4:
        r.fail(f"hidden_size {config.width} over {config.heads} heads, expected a head width that is a multiple of 4")
    if round(config.positions**0.5) ** 2 != config.positions:
        r.fail(f"num_position_embeddings {config.positions}, expected a square number")
    if list(config.deepstack) != sorted(set(config.deepstack)) or any(
        not 0 <= level < config.depth for level in config.deepstack
    ):
        r.fail(f"deepstack_visual_indexes {list(config.deepstack)}, expected rising block numbers under {config.depth}")
    r.finish()
    return config


def weights(config: ModelConfig) -> dict[str, dict[str, Weight]]:
    """Weight table: graph name ("vision", "language") -> initializer name -> where it is in the checkpoint."""
    return {"vision": _vision_weights(config.vision), "language": _text_weights(config.text)}


def ignored_weights(config: ModelConfig) -> frozenset[str]:
    """Tensors that a checkpoint may hold and the graphs do not need."""
    return frozenset({"lm_head.weight"} if config.text.tied_head else ())


def _linear(table: dict[str, Weight], name: str, source: str, inner: int, outer: int, bias: bool = True) -> None:
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
        source, name = f"{root}.blocks.{i}", f"blocks.{i}"
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
        source, name = f"{root}.layers.{i}", f"layers.{i}"
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
