"""Trains the pocket model: ``python -m ppexport.models.pocket.train --steps 4000`` (needs ``ppexport[cpu,export]``).

The towers are the torch modules that are exported (exporters/vision.py, exporters/language.py). Half of the samples are
pruned (pred_2d, tau = 0) unless --unpruned.

With the language loss alone the pictures are ignored for long, so reading is taught first: the vision tower sees pages
of random characters, and two heads, dropped afterwards, predict for each half of each patch the character whose centre
lies in it, from the tower's last hidden state and from the merged token. The attention heads start out looking at the
four neighbours of a patch (through their biases and the rotary positions), as a convolution would. Both together learn
in hundreds of steps what otherwise takes thousands. Then the whole model copies single lines of text, and only then it
sees screens and questions.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...exporters import language, vision
from ...exporters.random_checkpoint import qwen3_vl_config, write_text_files
from .. import qwen3_vl
from ..config import ModelConfig
from .lessons import (
    BLOCK,
    CELLS,
    CLASSES,
    IGNORE,
    MAX_PIXELS,
    MIN_PIXELS,
    PAGE,
    Item,
    Reader,
    batches,
    blocks,
    cells_of,
    line,
    page,
)
from .screens import SKILLS


class Pocket(nn.Module):
    """Both towers and the two heads that read characters in training."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tower = vision.VisionTower(config.vision)
        self.decoder = language.Decoder(config.text, config.image_token)
        self.patch_head = nn.Sequential(
            nn.LayerNorm(config.vision.width), nn.Linear(config.vision.width, CELLS * CLASSES)
        )
        self.token_head = nn.Linear(config.text.width, 4 * CELLS * CLASSES)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                fan = parameter.shape[0] if "table" not in name and "positions" not in name else 2500
                nn.init.normal_(parameter, 0.0, min(0.06, fan**-0.5))
        _look_at_neighbours(self.tower)
        fixed = vision.constants(config.vision, qwen3_vl.PREPROCESSING)
        for module, values in ((self.tower, fixed), (self.decoder, language.constants(config.text))):
            for name, value in values.items():
                module.get_buffer(name).copy_(torch.from_numpy(value))

    def reading_loss(self, hidden: Tensor, embeds: Tensor, cells: Tensor) -> Tensor:
        """Both heads' loss: hidden [T, width], embeds [T / 4, D], cells [T, CELLS] of real patches only."""
        patch = F.cross_entropy(self.patch_head(hidden).reshape(-1, CLASSES), cells.reshape(-1))
        return patch + F.cross_entropy(self.token_head(embeds).reshape(-1, CLASSES), cells.reshape(-1))

    def read_pages(self, rng: Random, batch: int) -> tuple[Tensor, float]:
        """(loss, share of characters that the merged tokens give right) on pages of random characters."""
        made = [page(rng) for _ in range(batch)]
        pixels = torch.from_numpy(np.stack([blocks(np.asarray(m.image)) for m in made])).float()
        rows, cols = PAGE[1] // BLOCK, PAGE[0] // BLOCK
        row, col = np.divmod(np.arange(rows * cols), cols)
        y = (row[:, None] * 2 + np.repeat([0, 1], 2)).reshape(-1)
        x = (col[:, None] * 2 + np.tile([0, 1], 2)).reshape(-1)
        cells = torch.from_numpy(np.concatenate([cells_of(m, PAGE[1], PAGE[0])[y, x] for m in made]))
        at_y, at_x = (torch.from_numpy(v).float().expand(batch, -1) for v in (y, x))
        hidden, _ = self.tower.trunk(pixels.reshape(-1, 768), at_y, at_x, 2 * rows, 2 * cols, None)
        embeds = self.tower.merger(hidden)
        found = self.token_head(embeds).reshape(-1, CLASSES).argmax(-1)
        wanted = cells.reshape(-1)
        right = (found == wanted)[wanted > 0].float().mean().item()
        return self.reading_loss(hidden, embeds, cells), right

    def forward(self, items: list[Item]) -> tuple[Tensor, Tensor, Tensor]:
        """(answer loss, auxiliary loss, which answers are right at every position under teacher forcing [B])."""
        B, T, S = len(items), max(len(i.y) for i in items), max(len(i.ids) for i in items)
        pixels, mask = torch.zeros(B, T, 768), torch.zeros(B, T, dtype=torch.bool)
        y, x = torch.zeros(B, T), torch.zeros(B, T)
        ids = torch.zeros(B, S, dtype=torch.int32)
        positions = torch.zeros(3, B, S, dtype=torch.int32)
        targets = torch.full((B, S), IGNORE)
        for b, item in enumerate(items):
            t, s = len(item.y), len(item.ids)
            pixels[b, :t], mask[b, :t] = torch.from_numpy(item.pixels).float(), True
            y[b, :t], x[b, :t] = torch.from_numpy(item.y), torch.from_numpy(item.x)
            ids[b, :s], targets[b, :s] = torch.from_numpy(item.ids), torch.from_numpy(item.targets)
            positions[:, b, :s] = torch.from_numpy(item.positions)
        height, width = (torch.tensor([[float(i.grid[a])] for i in items]) for a in (0, 1))
        hidden, levels = self.tower.trunk(pixels.reshape(-1, 768), y, x, height, width, mask)
        real = mask[:, ::4].reshape(-1)
        embeds, *deepstack = (level[real] for level in (self.tower.merger(hidden), *levels))
        c = self.decoder.c
        cache = torch.zeros(B, c.kv_heads, S, c.head_dim)
        at = torch.arange(S, dtype=torch.int32).expand(B, S)
        start = torch.zeros(B, dtype=torch.int32)
        logits, *_ = self.decoder(ids, embeds, torch.stack(deepstack), positions, start, at, [cache] * (2 * c.layers))
        loss = F.cross_entropy(logits.reshape(-1, c.vocab), targets.reshape(-1), ignore_index=IGNORE)
        cells = torch.from_numpy(np.concatenate([i.cells for i in items]))
        auxiliary = self.reading_loss(hidden[mask.reshape(-1)], embeds, cells)
        right = ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(1)
        return loss, auxiliary, right


def _look_at_neighbours(tower: vision.VisionTower, strength: float = 5.0) -> None:
    """Start each attention head at one of the four neighbours of a patch.

    Constant queries and keys (the biases) make the attention a function of the relative position alone, largest where
    the rotary angles of the offset cancel; the part that depends on content starts small.
    """
    c = tower.c
    half = c.head_dim // 2
    frequencies = 1.0 / c.rope_theta ** (torch.arange(0, half, 2) / half)
    for block in tower.blocks:
        q, k = torch.zeros(c.heads, c.head_dim), torch.zeros(c.heads, c.head_dim)
        for head in range(c.heads):
            dy, dx = ((0, -1), (0, 1), (-1, 0), (1, 0))[head % 4]
            angle = torch.cat((dy * frequencies, dx * frequencies))
            q[head, :half] = strength
            k[head, :half], k[head, half:] = strength * torch.cos(angle), -strength * torch.sin(angle)
        with torch.no_grad():
            block.qkv.bias[: 2 * c.width] = torch.cat((q.reshape(-1), k.reshape(-1)))
            block.qkv.weight[:, : 2 * c.width] *= 0.3


def pocket_config() -> dict[str, Any]:
    """config.json of the pocket model."""
    config = qwen3_vl_config("pocket")
    config["text_config"]["max_position_embeddings"] = 2048
    config["vision_config"]["num_position_embeddings"] = 256
    return config


def save_checkpoint(model: Pocket, directory: Path) -> None:
    """The Hugging Face checkpoint in bf16: names and layouts of the weight table, reversed."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = pocket_config()
    config = qwen3_vl.parse_config(raw)
    tables = qwen3_vl.weights(config)
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


@dataclass
class Run:
    """Training in progress; ``save`` and ``resume`` keep all of it but the random state of torch, which is not used."""

    model: Pocket
    optimizer: torch.optim.Optimizer
    output: Path
    state: Path
    step: int = 0  # of both phases together
    log: list[dict[str, Any]] = field(default_factory=list)

    def resume(self) -> None:
        """Continue from the saved state, if there is one."""
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.log = saved["step"], json.loads(saved["log"])

    def save(self) -> None:
        """Write the state and the checkpoint; an interruption leaves the ones before."""
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**saved, "step": self.step, "log": json.dumps(self.log)}, self.state.with_suffix(".partial"))
        os.replace(self.state.with_suffix(".partial"), self.state)
        save_checkpoint(self.model, self.output)

    def update(self, loss: Tensor, rate: float) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1

    def report(self, row: dict[str, Any]) -> None:
        """Log and print one row."""
        self.log.append(row)
        click.echo(json.dumps(row))


def teach_reading(run: Run, steps: int, rate: float) -> None:
    """Phase one: the vision tower alone, on pages of random characters."""
    rights: list[float] = []
    while run.step < steps:
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = run.model.read_pages(Random(f"page {run.step}"), 64)
        run.update(loss, rate * min(1.0, (run.step + 1) / 100))
        rights.append(right)
        if run.step % 50 == 0:
            row = {"phase": "read", "step": run.step, "loss": round(loss.item(), 4)}
            run.report({**row, "characters": round(sum(rights) / len(rights), 4)})
            rights = []
        if run.step % 200 == 0:
            run.save()


def teach_copying(run: Run, first: int, steps: int, rate: float, reader: Reader) -> None:
    """Phase two: everything, on single lines of text; ``first`` is the step at which it began."""
    rights: list[float] = []
    while run.step < first + steps:
        rng = Random(f"line {run.step}")
        items = sorted((reader.item(line(rng), rng) for _ in range(128)), key=lambda item: len(item.ids))
        for group in (items[:64], items[64:]):
            with torch.autocast("cpu", torch.bfloat16):
                loss, auxiliary, right = run.model(group)
            run.update(loss + 0.3 * auxiliary, rate * min(1.0, (run.step - first + 1) / 100))
            rights += right.tolist()
        if run.step % 50 == 0:
            row = {"phase": "copy", "step": run.step - first, "loss": round(loss.item(), 4)}
            run.report({**row, "exact": round(sum(rights) / len(rights), 4)})
            rights = []
        if run.step % 200 == 0:
            run.save()


def teach_answering(run: Run, first: int, steps: int, batch: int, rate: float, reader: Reader) -> None:
    """Phase three: everything, on screens with questions; ``first`` is the step at which it began."""
    seen: dict[str, list[float]] = defaultdict(list)
    losses, begin = [], time.time()
    while run.step < first + steps:
        for group in batches(run.step - first, steps, batch, reader):
            done = run.step - first
            progress = min(1.0, done / steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss, auxiliary, right = run.model([item for _, item in group])
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
            run.update(loss + (0.5 if progress < 0.3 else 0.2) * auxiliary, rate * min(1.0, (done + 1) / 200) * cosine)
            losses.append((loss.item(), auxiliary.item()))
            for (skill, _), ok in zip(group, right.tolist(), strict=True):
                seen[skill].append(ok)
        if (run.step - first) % 40 == 0:
            mean_loss, mean_auxiliary = (sum(v) / len(v) for v in zip(*losses, strict=True))
            row = {"phase": "answer", "step": run.step - first, "seconds": round(time.time() - begin)}
            row |= {"loss": round(mean_loss, 4), "auxiliary": round(mean_auxiliary, 4)}
            run.report(row | {skill: round(sum(seen[skill]) / max(1, len(seen[skill])), 3) for skill in SKILLS})
            losses, seen = [], defaultdict(list)
        if (run.step - first) % 200 == 0:
            run.save()
    run.save()


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The checkpoint directory.")
@click.option("--state", type=click.Path(path_type=Path), required=True, help="Saved progress; continues from it.")
@click.option("--read-steps", type=int, default=1200, show_default=True, help="Of the first phase, in batches of 64.")
@click.option("--copy-steps", type=int, default=1500, show_default=True, help="Of the second phase, in batches of 64.")
@click.option("--steps", type=int, default=4000, show_default=True, help="Of the third phase.")
@click.option("--batch", type=int, default=32, show_default=True)
@click.option("--rate", type=float, default=1.5e-3, show_default=True, help="Highest learning rate.")
@click.option("--unpruned", is_flag=True, help="Train without pruned samples.")
@click.option("--threads", type=int, default=2, show_default=True)
def main(
    output: Path,
    state: Path,
    read_steps: int,
    copy_steps: int,
    steps: int,
    batch: int,
    rate: float,
    unpruned: bool,
    threads: int,
) -> None:
    """Train, printing loss and teacher-forced accuracy per skill, saving often."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Pocket(qwen3_vl.parse_config(pocket_config()))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    run = Run(model, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98)), output, state)
    run.resume()
    trained = sum(p.numel() for n, p in model.named_parameters() if "head." not in n)
    click.echo(f"{trained / 1e6:.2f} M parameters")
    teach_reading(run, read_steps, rate)
    reader = Reader(0.0 if unpruned else 0.5)
    teach_copying(run, read_steps, copy_steps, rate, reader)
    teach_answering(run, read_steps + copy_steps, steps, batch, rate, reader)


if __name__ == "__main__":
    main()
