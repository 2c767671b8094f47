"""LLaVA-1.5 (Hugging Face ``model_type`` "llava"): its configuration keys, weight names and defaults.

A CLIP tower with views of one size, the features of one of its layers, a projector of two layers, and a decoder of
Llama, Mistral or Qwen2. Source: transformers ``models/llava`` and ``models/clip``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .attention_decoder import (
    HEAD,
    Table,
    decoder_numbers,
    decoder_weights,
    end_tokens,
    linear,
    norm,
    refuse_sliding_window,
)
from .config import ModelConfig, Preprocessing, TextConfig, VisionConfig, Weight
from .family import Frame, Kept, Placed, Prompt, View, Views
from .hfconfig import HARMLESS, Reader, defaults_of
from .layout import lay_out, one_after_the_other
from .pruners import Pruner
from .resize import MAX_PIXELS, check_sides, within_limit

VISION = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
LAYER = re.compile(re.escape(VISION) + r"\.encoder\.layers\.(\d+)\.")
# Buffers that old versions of transformers saved: the graphs calculate them.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
DECODERS = ("llama", "mistral", "qwen2")  # model_type of the text part

# Used where the checkpoint has no image processor configuration; the values of llava-hf/llava-1.5-7b-hf.
PREPROCESSING = Preprocessing(
    min_pixels=336 * 336,
    max_pixels=336 * 336,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    shortest_edge=336,
)

# The turns of a conversation as Vicuna was trained on; used where a checkpoint has a tokenizer but no chat template.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{% else %}{{ message.role | upper }}: {% endif %}"
    "{% if message.content is string %}{{ message.content }} {% else %}"
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Llava:
    """See family.Family."""

    model_type = "llava"
    preprocessing = PREPROCESSING
    chat_template = CHAT_TEMPLATE
    head = HEAD
    prune: tuple[Pruner, ...] = ()  # such towers have not been trained with patches missing

    def parse(self, raw: Mapping[str, Any], notices: list[str] | None = None) -> ModelConfig:
        """See family.Family."""
        told = [] if notices is None else notices
        harmless = [*HARMLESS, "image_seq_length", "projection_dim", "initializer_factor", "pretraining_tp"]
        top = Reader(raw, "config.json", told, defaults_of(self.model_type, "config.json"), harmless)
        text_section = self._text_section(top, harmless)
        text = _parse_text(text_section, self.is_tied(top, text_section.raw))
        eos = end_tokens(top) or end_tokens(text_section)
        text_section.finish()
        top.expect("projector_hidden_act", "gelu")
        strategy = top.get("vision_feature_select_strategy", str)
        if strategy != "default":
            top.fail(
                f"vision_feature_select_strategy is {strategy!r}, expected 'default': the class token is no feature"
            )
        section = top.section("vision_config", defaults_of("clip_vision_model", "config.json"), harmless)
        if (kind := section.get("model_type", str, "clip_vision_model")) != "clip_vision_model":
            section.fail(f"model_type is {kind!r}, expected 'clip_vision_model': no other tower is supported")
        vision = self._parse_vision(section, top, text.width)
        section.finish()
        model = ModelConfig(
            family=self.model_type,
            tower="clip_vit",
            decoder="attention",
            vision=vision,
            text=text,
            states=text.states(),
            image_token=self._image_token(top),
            eos_tokens=eos,
        )
        if model.image_token >= text.vocab:
            top.fail(
                f"image_token_index is {model.image_token}, expected under the vocabulary's {text.vocab}"
            )
        top.finish()
        return model

    def is_tied(self, top: Reader, text: Mapping[str, Any]) -> bool:
        """Is the output head the embedding table? transformers asks both parts of the configuration."""
        return top.get("tie_word_embeddings", bool, None) is True or text.get("tie_word_embeddings") is True

    def pinpoints(self, top: Reader) -> tuple[tuple[int, int], ...]:
        """The grids of views that the configuration has; there are none."""
        return ()

    def weights(self, model: ModelConfig) -> dict[str, Table]:
        """See family.Family."""
        return {"vision": self.vision_weights(model.vision), "language": decoder_weights(model.text)}

    def vision_weights(self, c: VisionConfig) -> Table:
        """Initializer of the vision graph -> where it lies."""
        embeddings = f"{VISION}.embeddings"
        kernel = (c.width, c.channels, c.patch, c.patch)
        table: Table = {
            "class_embedding": Weight(f"{embeddings}.class_embedding", (c.width,)),
            "patch_embed.weight": Weight(f"{embeddings}.patch_embedding.weight", kernel, "patch"),
            "positions": Weight(f"{embeddings}.position_embedding.weight", (c.positions, c.width)),
        }
        norm(table, "norm", f"{VISION}.pre_layrnorm", c.width)
        for i in range(c.depth):
            source = f"{VISION}.encoder.layers.{i}"
            name = f"blocks.{i}"
            norm(table, f"{name}.norm1", f"{source}.layer_norm1", c.width)
            for part, stored in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
                linear(table, f"{name}.{part}", f"{source}.self_attn.{stored}", c.width, c.width)
            norm(table, f"{name}.norm2", f"{source}.layer_norm2", c.width)
            linear(table, f"{name}.fc1", f"{source}.mlp.fc1", c.width, c.ffn)
            linear(table, f"{name}.fc2", f"{source}.mlp.fc2", c.ffn, c.width)
        linear(table, "fc1", f"{PROJECTOR}.linear_1", c.width, c.out_width, c.projector_bias)
        linear(table, "fc2", f"{PROJECTOR}.linear_2", c.out_width, c.out_width, c.projector_bias)
        return table

    def canonical_name(self, stored: str) -> str | None:
        """See family.Family. Published checkpoints hold ``language_model.model.*`` and ``vision_tower.*``."""
        if BUFFERS.search(stored):
            return None
        name = stored.removeprefix("model.")
        if name in ("language_model.lm_head.weight", HEAD):
            return HEAD
        for old, new in (
            ("language_model.model.", "language_model."),
            ("vision_tower.vision_model.", "vision_tower."),
        ):
            if name.startswith(old):
                name = new + name.removeprefix(old)
        return f"model.{name}"

    def unused(self, model: ModelConfig, name: str) -> bool:
        """See family.Family: layers after the one whose output the decoder gets, and the norm after the last."""
        layer = LAYER.match(name)
        return name.startswith(f"{VISION}.post_layernorm.") or (
            layer is not None and int(layer[1]) >= model.vision.depth
        )

    def views(self, model: ModelConfig, pre: Preprocessing, height: int, width: int) -> Views:
        """See family.Family: the middle of the image."""
        check_sides(height, width)
        side = model.vision.side
        grid = side // model.vision.patch
        frame = middle(pre, height, width, side)
        return Views((frame,), (View((0, 0, side, side), (grid, grid)),), grid * grid)

    def layout(self, model: ModelConfig, ids: np.ndarray, kept: Sequence[Kept]) -> Prompt:
        """See family.Family."""
        return lay_out(ids, model.image_token, kept, model.axes, self.place)

    def place(self, image: Kept) -> Placed:
        """What is kept, one after the other."""
        n = len(image.keep) + image.class_tokens
        return one_after_the_other(np.arange(n), n)

    def tower_inputs(self, model: ModelConfig, view: View, keep: np.ndarray) -> dict[str, np.ndarray]:
        """See family.Family: which of the kept tokens go on."""
        return {"wanted": view.rows_wanted(keep)}

    def _text_section(self, top: Reader, harmless: Sequence[str]) -> Reader:
        raw = top.get("text_config", Mapping)
        kind = raw.get("model_type", "llama")
        if kind not in DECODERS:
            top.fail(f"text_config: model_type is {kind!r}, expected one of: {', '.join(DECODERS)}")
        return top.section("text_config", defaults_of(kind, "config.json"), harmless)

    def _image_token(self, top: Reader) -> int:
        """Under either of its names."""
        named: int | None = top.get("image_token_id", int, None, at_least=0)
        index: int = top.get("image_token_index", int, at_least=0)
        return index if named is None else named

    def _parse_vision(self, r: Reader, top: Reader, out_width: int) -> VisionConfig:
        r.expect("num_channels", 3)
        act = r.get("hidden_act", str)
        if act not in ("quick_gelu", "gelu"):
            r.fail(f"hidden_act is {act!r}, expected 'quick_gelu' or 'gelu'")
        layers = r.get("num_hidden_layers", int)
        layer = top.get("vision_feature_layer", (int, list), at_least=-layers)
        if isinstance(layer, list):
            top.fail(f"vision_feature_layer is {layer}, expected the number of one layer")
        depth = layer if layer >= 0 else layers + 1 + layer  # 0 is what goes into the first layer
        if not 1 <= depth <= layers:
            top.fail(f"vision_feature_layer is {layer}, expected one of the {layers} layers")
        width = r.get("hidden_size", int)
        heads = r.get("num_attention_heads", int)
        side = r.side("image_size")
        patch = r.side("patch_size")
        pinpoints = self.pinpoints(top)
        for grid in pinpoints:
            if any(n % side for n in grid) or math.prod(grid) > MAX_PIXELS:
                top.fail(
                    f"image_grid_pinpoints holds {list(grid)}, expected multiples of the {side} pixels of a view, "
                    f"and at most {MAX_PIXELS} pixels"
                )
        if width % heads or side % patch:
            r.fail(
                f"hidden_size {width} over {heads} heads and image_size {side} over patches of {patch}, expected "
                "multiples"
            )
        return VisionConfig(
            depth=depth,
            width=width,
            heads=heads,
            ffn=r.get("intermediate_size", int),
            patch=patch,
            merge=1,
            temporal_patch=1,
            out_width=out_width,
            positions=(side // patch) ** 2 + 1,
            patch_bias=False,
            norm_eps=r.get("layer_norm_eps", float),
            mlp=act,
            side=side,
            class_token=True,
            projector_bias=top.get("multimodal_projector_bias", bool),
            pinpoints=pinpoints,
        )


def middle(pre: Preprocessing, height: int, width: int, side: int) -> Frame:
    """The square picture of so many pixels that is made of an image.

    Source: transformers ``models/llava/image_processing_pil_llava.py`` and ``image_transforms.center_crop``.
    """
    fill = tuple(int(value * 255) for value in pre.mean)
    if pre.pad_to_square:
        height = width = max(height, width)
    if not pre.shortest_edge:
        return Frame(side, side, None, pre.pad_to_square, fill)  # type: ignore[arg-type]
    short = min(height, width)
    H, W = (
        pre.shortest_edge if edge == short else int(pre.shortest_edge * edge / short)
        for edge in (height, width)
    )
    within_limit(H, W)
    box = ((H - side) // 2, (W - side) // 2, side, side)
    return Frame(H, W, box, pre.pad_to_square, fill)  # type: ignore[arg-type]


def _parse_text(r: Reader, tied: bool) -> TextConfig:
    kind = r.get("model_type", str, "llama")
    width = r.get("hidden_size", int)
    heads = r.get("num_attention_heads", int)
    if width % heads:
        r.fail(f"hidden_size {width}, expected a multiple of the {heads} attention heads")
    head_dim = width // heads
    if kind != "qwen2":
        head_dim = r.get("head_dim", int, head_dim)
    r.get("tie_word_embeddings", bool, None)
    config = decoder_numbers(r, tied, head_dim, qkv_bias=kind == "qwen2", qk_norm=False)
    if kind == "qwen2":
        refuse_sliding_window(r, config.layers)
    elif kind == "mistral":
        default = None if "sliding_window" in r.raw else (r.defaults or {}).get("sliding_window")
        window = r.get("sliding_window", int, default)
        if window is not None and window < config.context:
            r.fail(
                f"sliding_window is {window!r:.80}, expected null: every layer sees all {config.context} tokens of the "
                "context"
            )
    return config


LLAVA = Llava()
