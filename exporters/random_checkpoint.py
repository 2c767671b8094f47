"""Checkpoints with random weights at real dimensions, to measure and test without a download.

python -m ppexport.exporters.random_checkpoint OUT --family qwen2_vl --shape 2b
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from ..models.bytelevel import IDS, VOCAB, byte_tokenizer
from ..models.dtype import BY_PRECISION
from ..models.families import FAMILIES, family_of

DTYPES: dict[str, torch.dtype] = {dtype.name: getattr(torch, dtype.name) for dtype in BY_PRECISION.values()}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the published ones are named by their parameters."""

    # of the decoder
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    sections: tuple[int, ...]  # mRoPE; none: positions on one axis
    # of the vision tower
    depth: int
    vision_width: int
    vision_ffn: int
    vision_heads: int
    marked: tuple[
        int, ...
    ] = ()  # blocks with deepstack levels (Qwen3-VL), or that see the whole image (Qwen2.5-VL)
    # of linear attention (Qwen3.5): key heads, value heads, their widths
    linear: tuple[int, int, int, int] = (0, 0, 0, 0)
    # of LLaVA
    text: str = "llama"  # model_type of the decoder
    side: int = 336  # pixels of a view


TINY_LLAVA = Shape(2, 64, 128, 4, 4, 16, VOCAB + 1, False, (), 4, 64, 128, 4, side=84)
LLAVA_300M = Shape(16, 1024, 3072, 16, 16, 64, 32000, False, (), 13, 768, 3072, 12)
VICUNA_7B = Shape(32, 4096, 11008, 32, 32, 128, 32064, False, (), 24, 1024, 4096, 16)
MISTRAL_7B = Shape(32, 4096, 14336, 32, 8, 128, 32064, False, (), 24, 1024, 4096, 16, text="mistral")
QWEN3_5_2B = Shape(
    24, 2048, 6144, 8, 2, 256, 248320, True, (11, 11, 10), 24, 1024, 4096, 16, linear=(16, 16, 128, 128)
)
QWEN3_5_4B = replace(
    QWEN3_5_2B, layers=32, width=2560, ffn=9216, heads=16, kv_heads=4, linear=(16, 32, 128, 128)
)
QWEN3_5 = {
    "tiny": Shape(4, 64, 128, 4, 2, 32, VOCAB + 1, True, (2, 1, 1), 3, 64, 128, 4, linear=(2, 4, 16, 16)),
    "300m": Shape(
        16, 1024, 3072, 8, 2, 128, 32000, True, (6, 5, 5), 12, 768, 3072, 12, linear=(8, 16, 64, 64)
    ),
    "2b": QWEN3_5_2B,
    "4b": QWEN3_5_4B,
}
SHAPES: dict[str, dict[str, Shape]] = {
    "llava": {"tiny": TINY_LLAVA, "300m": LLAVA_300M, "7b": VICUNA_7B},
    "llava_next": {
        "tiny": replace(TINY_LLAVA, kv_heads=2, text="mistral"),
        "300m": LLAVA_300M,
        "7b": VICUNA_7B,
        "mistral_7b": MISTRAL_7B,
    },
    "qwen2_vl": {
        "tiny": Shape(2, 64, 128, 4, 2, 16, VOCAB + 1, False, (2, 3, 3), 3, 64, 256, 4),
        "300m": Shape(16, 1024, 4096, 16, 4, 64, 32000, True, (8, 12, 12), 12, 768, 3072, 12),
        "2b": Shape(28, 1536, 8960, 12, 2, 128, 151936, True, (16, 24, 24), 32, 1280, 5120, 16),
    },
    "qwen2_5_vl": {
        "tiny": Shape(2, 64, 128, 4, 2, 16, VOCAB + 1, False, (2, 3, 3), 4, 64, 108, 4, (1, 3)),
        "300m": Shape(16, 1024, 4096, 16, 4, 64, 32000, True, (8, 12, 12), 12, 768, 2304, 12, (2, 5, 8, 11)),
        "3b": Shape(
            36, 2048, 11008, 16, 2, 128, 151936, True, (16, 24, 24), 32, 1280, 3420, 16, (7, 15, 23, 31)
        ),
    },
    "qwen3_5": QWEN3_5,
    "qwen3_5_text": QWEN3_5,
    "qwen3_vl": {
        "tiny": Shape(2, 64, 128, 4, 2, 16, VOCAB + 1, False, (4, 2, 2), 3, 64, 128, 4, (0, 1)),
        "pocket": Shape(6, 192, 512, 4, 2, 48, VOCAB, True, (8, 8, 8), 4, 128, 512, 4, (0, 2)),
        "300m": Shape(16, 1024, 3072, 16, 8, 64, 32000, True, (12, 10, 10), 12, 768, 3072, 12, (3, 6, 9)),
        "2b": Shape(28, 2048, 6144, 16, 8, 128, 151936, True, (24, 20, 20), 24, 1024, 4096, 16, (5, 11, 17)),
        "4b": Shape(36, 2560, 9728, 32, 8, 128, 151936, True, (24, 20, 20), 24, 1024, 4096, 16, (5, 11, 17)),
        "8b": Shape(
            36, 4096, 12288, 32, 8, 128, 151936, False, (24, 20, 20), 27, 1152, 4304, 16, (8, 16, 24)
        ),
    },
}


def random_config(family: str, shape: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """A config.json of a family at one of its SHAPES, with the keys that published checkpoints have."""
    made = {
        "llava": _llava,
        "llava_next": _llava_next,
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_5": _qwen3_5,
        "qwen3_5_text": _qwen3_5_text,
        "qwen3_vl": _qwen3_vl,
    }
    return made[family](SHAPES[family][shape], dtype)


def _top(family: str, architecture: str, c: Shape, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": family,
        "dtype": dtype,
        "tie_word_embeddings": c.tied,
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
    }


def _llava(c: Shape, dtype: str) -> dict[str, Any]:
    text = {**_decoder(c), "model_type": c.text, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    text |= {"max_position_embeddings": 4096, "tie_word_embeddings": c.tied}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": c.vision_width,
        "intermediate_size": c.vision_ffn,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.vision_heads,
        "image_size": c.side,
        "patch_size": 14,
        "projection_dim": 768,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "tie_word_embeddings": c.tied,
        "image_token_index": IDS["<|image_pad|>"],
        "image_seq_length": (c.side // 14) ** 2,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": vision,
    }


def _llava_next(c: Shape, dtype: str) -> dict[str, Any]:
    own = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
    config = {**_llava(c, dtype), **own, "image_grid_pinpoints": _pinpoints(c.side)}
    if c.text == "mistral":
        config["text_config"] |= {"sliding_window": None, "max_position_embeddings": 32768}
        config["text_config"] |= {"rope_theta": 1000000.0}
    return config


def _pinpoints(side: int) -> list[list[int]]:
    """Heights and widths of LLaVA-NeXT, in views of ``side`` pixels."""
    return [[rows * side, columns * side] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def _decoder(c: Shape) -> dict[str, Any]:
    return {
        "num_hidden_layers": c.layers,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "vocab_size": c.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "eos_token_id": IDS["<|im_end|>"],
    }


def _tower(c: Shape, patch: int) -> dict[str, Any]:
    return {
        "depth": c.depth,
        "num_heads": c.vision_heads,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _qwen2_text(c: Shape) -> dict[str, Any]:
    """At the top of config.json."""
    return {
        **_decoder(c),
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(c.sections)},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": c.layers,
    }


def _qwen2_vl(c: Shape, dtype: str) -> dict[str, Any]:
    vision = {
        "embed_dim": c.vision_width,
        "hidden_size": c.width,
        "mlp_ratio": c.vision_ffn // c.vision_width,
        "in_chans": 3,
    }
    top = _top("qwen2_vl", "Qwen2VLForConditionalGeneration", c, dtype)
    return {**top, **_qwen2_text(c), "vision_config": {**_tower(c, 14), **vision}}


def _qwen2_5_vl(c: Shape, dtype: str) -> dict[str, Any]:
    vision = {
        "hidden_act": "silu",
        "hidden_size": c.vision_width,
        "intermediate_size": c.vision_ffn,
        "out_hidden_size": c.width,
        "window_size": 112,
        "fullatt_block_indexes": list(c.marked),
        "tokens_per_second": 2,
        "in_chans": 3,
    }
    top = _top("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", c, dtype)
    return {**top, **_qwen2_text(c), "vision_config": {**_tower(c, 14), **vision}}


def _qwen3_vl(c: Shape, dtype: str) -> dict[str, Any]:
    text = {
        **_decoder(c),
        "model_type": "qwen3_vl_text",
        "head_dim": c.head_dim,
        "attention_bias": False,
        "rope_theta": 5000000,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": list(c.sections),
        },
        "tie_word_embeddings": c.tied,  # here, too, as in the published checkpoints
    }
    vision = {
        **_tower(c, 16),
        "model_type": "qwen3_vl",
        "hidden_size": c.vision_width,
        "intermediate_size": c.vision_ffn,
        "deepstack_visual_indexes": list(c.marked),
        "out_hidden_size": c.width,
        "num_position_embeddings": 2304,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
    }
    top = _top("qwen3_vl", "Qwen3VLForConditionalGeneration", c, dtype)
    return {**top, "text_config": text, "vision_config": vision}


def _qwen3_5(c: Shape, dtype: str) -> dict[str, Any]:
    made = _qwen3_vl(c, dtype)
    key_heads, value_heads, key_dim, value_dim = c.linear
    text = made["text_config"]
    del text["rope_theta"], text["rope_scaling"]
    text |= {
        "model_type": "qwen3_5_text",
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": list(c.sections),
        },
    }
    vision = made["vision_config"]
    del vision["deepstack_visual_indexes"]
    vision["model_type"] = "qwen3_5"
    return {**made, "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}


def _qwen3_5_text(c: Shape, dtype: str) -> dict[str, Any]:
    return {**_qwen3_5(c, dtype)["text_config"], "architectures": ["Qwen3_5ForCausalLM"], "dtype": dtype}


def write_random(config: dict[str, Any], directory: Path, seed: int = 0, shard_bytes: int = 1 << 30) -> None:
    """Write config.json and safetensors shards with weights drawn from N(0, 0.02); norms multiply by about 1.

    The dtype is the config's. No more than one shard is in memory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    family = family_of(config)
    dtype = DTYPES[config["dtype"]]
    tables = family.weights(family.parse(config))
    shapes = {w.source: w.shape for table in tables.values() for w in table.values()}
    centred = {w.source for table in tables.values() for w in table.values() if w.layout == "one_plus"}
    generator = torch.Generator().manual_seed(seed)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    where = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16 if dtype != torch.float32 else dtype)
            tensor.normal_(0.0, 0.02, generator=generator)
            if name.endswith("weight") and len(shapes[name]) == 1 and name not in centred:  # of a norm
                tensor += 1
            tensors[name] = tensor.to(dtype)
            where[name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_text_files(directory: Path, family: str = "qwen3_vl") -> None:
    """Write the byte-level tokenizer, the family's chat template, generation and preprocessor configuration."""
    named = FAMILIES[family]
    pre = named.preprocessing
    processor: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 16 if family in ("qwen3_vl", "qwen3_5") else 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": pre.min_pixels, "longest_edge": 2359296},
    }
    if family in ("llava", "llava_next"):
        side = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vision_config"][
            "image_size"
        ]
        processor = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
        }
    if family == "llava_next":
        processor |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": _pinpoints(side),
        }
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        "generation_config.json": {"eos_token_id": [IDS["<|im_end|>"], IDS["<|endoftext|>"]]},
        "preprocessor_config.json": {**processor, "image_mean": pre.mean, "image_std": pre.std},
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    template = named.chat_template.replace("<image>", "<|image_pad|>")  # as the tokenizer has it
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--family", type=click.Choice(sorted(SHAPES)), default="qwen3_vl", show_default=True)
@click.option(
    "--shape",
    type=click.Choice(sorted({name for shapes in SHAPES.values() for name in shapes})),
    required=True,
)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="bfloat16", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(directory: Path, family: str, shape: str, dtype: str, seed: int) -> None:
    """Write a random checkpoint into DIRECTORY."""
    if shape not in SHAPES[family]:
        raise click.UsageError(
            f"{family} has no shape {shape!r}, expected one of: {', '.join(SHAPES[family])}"
        )
    write_random(random_config(family, shape, dtype), directory, seed)
    write_text_files(directory, family)


if __name__ == "__main__":
    main()
