"""Tiles of an image through layers of CLIP one after the other, or as one batch.

    python bench/tiles.py -o bench/results/tiles.json

Layers of CLIP-L as LLaVA-NeXT has it (24 of width 1024) with random weights, float32 on ONNX Runtime, 577 tokens a
view: ``--views`` runs of one view against one run of all, in turns. What this does not show is that pruned views have
different numbers of tokens, so a batch would be filled up to the longest.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.export import Dim

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

from ppexport.exporters import graphs
from ppexport.exporters.lowering.dialects import DIALECTS, lower
from ppexport.exporters.random_checkpoint import random_config
from ppexport.exporters.towers.clip_vit import Block
from ppexport.models.config import VisionConfig
from ppexport.models.families import FAMILIES


class ViewsBlock(Block):
    """A layer over the tokens of several views, each of which attends to its own only."""

    def __init__(self, c: VisionConfig, views: int):
        super().__init__(c, torch.float32, frozenset())
        self.views = views

    def by_head(self, x: Tensor) -> Tensor:
        """x [views * n, C] -> [views, n, heads, Dh]."""
        return x.reshape(self.views, -1, self.heads, self.head_dim)


class Layers(nn.Module):
    """Some layers of the tower."""

    def __init__(self, c: VisionConfig, views: int, layers: int):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ViewsBlock(c, views) for _ in range(layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [views * n, C]."""
        for block in self.blocks:
            x, paid = block(x)
        return x, paid


def session(c: VisionConfig, views: int, layers: int, folder: Path) -> ort.InferenceSession:
    """Layers over so many views at once."""
    x = torch.zeros(views * 9, c.width)
    shapes = ({0: views * Dim("n", max=4096)},)
    model = graphs._trace(Layers(c, views, layers), (x,), shapes, ["x"], ["y", "paid"])
    lower(model, DIALECTS["ort"])
    graphs.clean(model)
    path = folder / f"{views}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return ort.InferenceSession(path)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--views", default=5, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--runs", default=15, show_default=True)
def main(output: Path, views: int, layers: int, runs: int) -> None:
    """Measure and write a JSON file."""
    c = FAMILIES["llava_next"].parse(random_config("llava_next", "7b")).vision
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        one, together = (session(c, n, layers, Path(folder)) for n in (1, views))
        for tokens in (577, 289, 97):
            x = np.random.default_rng(0).standard_normal((views * tokens, c.width)).astype(np.float32)
            times: dict[str, list[float]] = {"one by one": [], "as one batch": []}
            for _ in range(runs):
                begin = time.perf_counter()
                apart = [one.run(["y"], {"x": part})[0] for part in np.split(x, views)]
                times["one by one"].append((time.perf_counter() - begin) * 1e3)
                begin = time.perf_counter()
                (batch,) = together.run(["y"], {"x": x})
                times["as one batch"].append((time.perf_counter() - begin) * 1e3)
                assert np.abs(np.concatenate(apart) - batch).max() < 1e-3
            row: dict[str, object] = {"tokens": tokens, "views": views, "layers": layers}
            row |= {f"{name}_ms": round(median(each[2:]), 1) for name, each in times.items()}
            rows.append(row)
            click.echo(json.dumps(row))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": describe(), "runs": runs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
