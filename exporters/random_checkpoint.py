"""Checkpoints with random weights at real dimensions, to measure and test without a download.

python -m ppexport.exporters.random_checkpoint OUT --shape 2b
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from ..models import qwen3_vl
from ..models.bytelevel import IDS, VOCAB, byte_tokenizer
from ..models.dtype import BY_PRECISION
from ..models.families import family_of

DTYPES: dict[str, torch.dtype] = {dtype.name: getattr(torch, dtype.name) for dtype in BY_PRECISION.values()}
# (text layers, width, ffn, heads, kv heads, head width, vocabulary, tied, mRoPE sections,
#  vision depth, width, ffn, heads, deepstack blocks)
SHAPES: dict[str, tuple[Any, ...]] = {
    "tiny": (2, 64, 128, 4, 2, 16, VOCAB + 1, False, [4, 2, 2], 3, 64, 128, 4, [0, 1]),
    "pocket": (6, 192, 512, 4, 2, 48, VOCAB, True, [8, 8, 8], 4, 128, 512, 4, [0, 2]),
    "300m": (16, 1024, 3072, 16, 8, 64, 32000, True, [12, 10, 10], 12, 768, 3072, 12, [3, 6, 9]),
    "2b": (28, 2048, 6144, 16, 8, 128, 151936, True, [24, 20, 20], 24, 1024, 4096, 16, [5, 11, 17]),
}


def qwen3_vl_config(shape: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """A config.json of the Qwen3-VL family at one of SHAPES."""
    layers, width, ffn, heads, kv, head, vocab, tied, mrope, depth, v_width, v_ffn, v_heads, deepstack = (
        SHAPES[shape]
    )
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": dtype,
        "tie_word_embeddings": tied,
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": head,
            "vocab_size": vocab,
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": mrope},
            "max_position_embeddings": 32768,
            "tie_word_embeddings": tied,  # here, too, as in the published checkpoints
            "eos_token_id": IDS["<|im_end|>"],
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": depth,
            "hidden_size": v_width,
            "intermediate_size": v_ffn,
            "num_heads": v_heads,
            "deepstack_visual_indexes": deepstack,
            "out_hidden_size": width,
            "num_position_embeddings": 2304,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def write_random(config: dict[str, Any], directory: Path, seed: int = 0, shard_bytes: int = 1 << 30) -> None:
    """Write config.json and safetensors shards with weights drawn from N(0, 0.02); norms are near 1, biases near 0.

    The dtype is the config's. No more than one shard is in memory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    family = family_of(config)
    dtype = DTYPES[config["dtype"]]
    tables = family.weights(family.parse(config))
    shapes = {w.source: w.shape for table in tables.values() for w in table.values()}
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
            if name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")):
                tensor += 1
            tensors[name] = tensor.to(dtype)
            where[name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_text_files(directory: Path) -> None:
    """Write the byte-level tokenizer, the family's chat template, generation and preprocessor configuration."""
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        "generation_config.json": {"eos_token_id": [IDS["<|im_end|>"], IDS["<|endoftext|>"]]},
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": {"shortest_edge": 65536, "longest_edge": 2359296},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(qwen3_vl.CHAT_TEMPLATE, encoding="utf-8")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(sorted(SHAPES)), required=True)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), default="bfloat16", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(directory: Path, shape: str, dtype: str, seed: int) -> None:
    """Write a random Qwen3-VL checkpoint into DIRECTORY."""
    write_random(qwen3_vl_config(shape, dtype), directory, seed)
    write_text_files(directory)


if __name__ == "__main__":
    main()
