"""Writes the trained model as a Hugging Face checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from lessons import MAX_PIXELS, MIN_PIXELS
from network import Pocket, pocket_config
from safetensors.torch import save_file

from ppexport.exporters.random_checkpoint import write_text_files
from ppexport.models import qwen3_vl


def save_checkpoint(model: Pocket, directory: Path) -> None:
    """The Hugging Face checkpoint in bf16: names and layouts of the weight table, reversed."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = pocket_config()
    config = qwen3_vl.QWEN3_VL.parse(raw)
    tables = qwen3_vl.QWEN3_VL.weights(config)
    tensors = {}
    for module, graph in ((model.tower, "vision"), (model.decoder, "language")):
        parameters = dict(module.named_parameters())
        for name, weight in tables[graph].items():
            value = parameters[name].detach()
            if weight.layout == "transpose":
                value = value.t()
            elif weight.layout == "patch":  # each of the frames carries half
                d, c, frames, p, _ = weight.shape
                kernel = value.reshape(p, p, c, d).permute(3, 2, 0, 1) / frames
                value = kernel.unsqueeze(2).expand(weight.shape)
            tensors[weight.source] = value.to(torch.bfloat16).contiguous()
    partial = directory / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    write_text_files(directory)
    file = directory / "preprocessor_config.json"
    pre = json.loads(file.read_text(encoding="utf-8"))
    pre["size"] = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    file.write_text(json.dumps(pre, indent=1) + "\n", encoding="utf-8")
