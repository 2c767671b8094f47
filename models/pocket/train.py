"""Trains the pocket model: ``python -m ppexport.models.pocket.train --steps 4000`` (needs ``ppexport[cpu,export]``).

The towers are the torch modules that are exported (exporters/vision.py, exporters/language.py). Half of the samples are
pruned (pred_2d, tau = 0) unless --unpruned. While it trains, a head that is dropped afterwards predicts the characters
under each kept token from the vision output; without it the language loss alone ignores the pictures for a long time.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass
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
from ...runtime.image import prepare
from ...runtime.language import build_prompt
from ...runtime.prune import Prune, Selection, packaged_selector
from .. import qwen3_vl
from ..bytelevel import IDS, byte_tokenizer
from ..config import ModelConfig
from .screens import SKILLS, Sample, sample

MIN_PIXELS, MAX_PIXELS = 9216, 307200
SLOTS, CLASSES = 10, 128  # characters under a token, in reading order; ASCII
BLOCK = 32
IGNORE = -100


@dataclass(frozen=True)
class Item:
    """A sample as arrays."""

    pixels: np.ndarray  # uint8 [4 K, 768]
    y: np.ndarray  # float32 [4 K], patch coordinates
    x: np.ndarray
    grid: tuple[int, int]  # patches
    ids: np.ndarray  # int32 [S]
    positions: np.ndarray  # int32 [3, S]
    targets: np.ndarray  # int64 [S], the token to predict at each position
    slots: np.ndarray  # int64 [K, SLOTS], characters under each kept token


class Reader:
    """Samples -> arrays."""

    def __init__(self, pruned_share: float):
        self.pruned_share, self.tokenizer = pruned_share, byte_tokenizer()
        self.selector = packaged_selector(BLOCK)

    def item(self, made: Sample, rng: Random) -> Item:
        """Resize, select, tokenize; prompt and answer as the chat template writes them."""
        image = prepare(np.asarray(made.image), BLOCK, MIN_PIXELS, MAX_PIXELS)
        prune = Prune() if rng.random() < self.pruned_share else None
        _, selection = self.selector.select(self.selector.backend.upload(image), prune)
        rows, cols = np.divmod(selection.keep, selection.cols)
        H, W = image.shape[:2]
        tiles = image.reshape(H // 32, 2, 16, W // 32, 2, 16, 3).transpose(0, 3, 1, 4, 2, 5, 6)
        pixels = tiles[rows, cols].reshape(-1, 768)
        within_y, within_x = np.repeat([0, 1], 2), np.tile([0, 1], 2)
        y, x = (rows[:, None] * 2 + within_y).reshape(-1), (cols[:, None] * 2 + within_x).reshape(-1)
        ids, targets = self._tokens(made, selection)
        prompt = build_prompt(ids, IDS["<|image_pad|>"], [selection])
        is_image = ids == IDS["<|image_pad|>"]
        stays = ~is_image
        stays[np.flatnonzero(is_image)[selection.keep]] = True
        return Item(
            pixels,
            y.astype(np.float32),
            x.astype(np.float32),
            (H // 16, W // 16),
            prompt.ids,
            prompt.positions,
            targets[stays],
            _slots(made, selection, H, W),
        )

    def _tokens(self, made: Sample, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        before = encode("<|im_start|>user\n<|vision_start|>")
        after = encode(f"<|vision_end|>{made.question}<|im_end|>\n<|im_start|>assistant\n")
        answer = [*encode(made.answer), IDS["<|im_end|>"]]
        prompt = [*before, *[IDS["<|image_pad|>"]] * selection.total, *after]
        ids = np.array(prompt + answer[:-1], np.int32)
        targets = np.full(len(ids), IGNORE, np.int64)
        targets[len(prompt) - 1 :] = answer
        return ids, targets


def _slots(made: Sample, selection: Selection, H: int, W: int) -> np.ndarray:
    """Characters whose centre lies in each kept block, by line and then from left to right."""
    scale_x, scale_y = W / made.image.width, H / made.image.height
    under: dict[int, list[tuple[int, float, int]]] = defaultdict(list)
    for cx, cy, character in made.characters:
        px, py = cx * scale_x, cy * scale_y
        token = int(py // BLOCK) * selection.cols + int(px // BLOCK)
        if ord(character) < CLASSES:
            under[token].append((int(py), px, ord(character)))
    slots = np.zeros((selection.kept, SLOTS), np.int64)
    for i, token in enumerate(selection.keep.tolist()):
        found = [code for _, _, code in sorted(under.get(token, []))][:SLOTS]
        slots[i, : len(found)] = found
    return slots


class Pocket(nn.Module):
    """Both towers and the auxiliary head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tower = vision.VisionTower(config.vision)
        self.decoder = language.Decoder(config.text, config.image_token)
        self.auxiliary = nn.Linear(config.text.width, SLOTS * CLASSES)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                fan = parameter.shape[0] if "table" not in name and "positions" not in name else 2500
                nn.init.normal_(parameter, 0.0, min(0.06, fan**-0.5))
        fixed = vision.constants(config.vision, qwen3_vl.PREPROCESSING)
        for module, values in ((self.tower, fixed), (self.decoder, language.constants(config.text))):
            for name, value in values.items():
                module.get_buffer(name).copy_(torch.from_numpy(value))

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
        levels = self.tower.encode(pixels.reshape(-1, 768), y, x, height, width, mask)
        real = mask[:, ::4].reshape(-1)
        embeds, *deepstack = (level[real] for level in levels)
        c = self.decoder.c
        cache = torch.zeros(B, c.kv_heads, S, c.head_dim)
        at = torch.arange(S, dtype=torch.int32).expand(B, S)
        start = torch.zeros(B, dtype=torch.int32)
        logits, *_ = self.decoder(ids, embeds, torch.stack(deepstack), positions, start, at, [cache] * (2 * c.layers))
        loss = F.cross_entropy(logits.reshape(-1, c.vocab), targets.reshape(-1), ignore_index=IGNORE)
        slots = torch.from_numpy(np.concatenate([i.slots for i in items]))
        auxiliary = F.cross_entropy(self.auxiliary(embeds).reshape(-1, CLASSES), slots.reshape(-1))
        right = ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(1)
        return loss, auxiliary, right


def pocket_config() -> dict[str, Any]:
    """config.json of the pocket model."""
    config = qwen3_vl_config("pocket")
    config["text_config"]["max_position_embeddings"] = 2048
    config["vision_config"]["num_position_embeddings"] = 256
    return config


def stage(progress: float) -> tuple[dict[str, float], tuple[int, int]]:
    """The curriculum: shares of the skills and the largest picture, at a progress of 0 ... 1."""
    if progress < 0.12:
        return {"transcribe": 0.55, "read": 0.25, "locate": 0.1, "yesno": 0.1}, (288, 192)
    if progress < 0.75:
        return {"transcribe": 0.2, "read": 0.55, "locate": 0.13, "yesno": 0.12}, (384, 256)
    return {"transcribe": 0.2, "read": 0.5, "locate": 0.17, "yesno": 0.13}, (640, 480)


def batches(step: int, steps: int, size: int, reader: Reader) -> list[list[tuple[str, Item]]]:
    """Four batches of samples of like length; the same ones for the same step."""
    shares, largest = stage(step / steps)
    rng = Random(f"pocket {step}")
    items = []
    for _ in range(4 * size):
        skill = rng.choices(list(shares), list(shares.values()))[0]
        items.append((skill, reader.item(sample(skill, rng.randrange(10**9), largest), rng)))
    items.sort(key=lambda pair: len(pair[1].ids))
    groups = [items[i : i + size] for i in range(0, len(items), size)]
    rng.shuffle(groups)
    return groups


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


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The checkpoint directory.")
@click.option("--state", type=click.Path(path_type=Path), required=True, help="Saved progress; continues from it.")
@click.option("--steps", type=int, default=4000, show_default=True)
@click.option("--batch", type=int, default=32, show_default=True)
@click.option("--rate", type=float, default=1.5e-3, show_default=True, help="Highest learning rate.")
@click.option("--unpruned", is_flag=True, help="Train without pruned samples.")
@click.option("--threads", type=int, default=2, show_default=True)
def main(output: Path, state: Path, steps: int, batch: int, rate: float, unpruned: bool, threads: int) -> None:
    """Train, printing loss and teacher-forced accuracy per skill, saving often."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Pocket(qwen3_vl.parse_config(pocket_config()))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    log: list[dict[str, Any]] = []
    step = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, log = saved["step"], json.loads(saved["log"])
    reader = Reader(0.0 if unpruned else 0.5)
    click.echo(f"{sum(p.numel() for n, p in model.named_parameters() if 'auxiliary' not in n) / 1e6:.2f} M parameters")
    seen: dict[str, list[float]] = defaultdict(list)
    losses, begin = [], time.time()
    while step < steps:
        for group in batches(step, steps, batch, reader):
            progress = step / steps
            warm = min(1.0, (step + 1) / 200)
            for g in optimizer.param_groups:
                g["lr"] = rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
            with torch.autocast("cpu", torch.bfloat16):
                loss, auxiliary, right = model([item for _, item in group])
            total = loss + (1.0 if progress < 0.3 else 0.3) * auxiliary
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append((loss.item(), auxiliary.item()))
            for (skill, _), ok in zip(group, right.tolist(), strict=True):
                seen[skill].append(ok)
            if step % 50 == 0:
                mean_loss, mean_auxiliary = (sum(v) / len(v) for v in zip(*losses, strict=True))
                row = {"step": step, "seconds": round(time.time() - begin), "loss": round(mean_loss, 4)}
                row |= {"auxiliary": round(mean_auxiliary, 4)}
                row |= {skill: round(sum(seen[skill]) / max(1, len(seen[skill])), 3) for skill in SKILLS}
                log.append(row)
                click.echo(json.dumps(row))
                losses, seen = [], defaultdict(list)
            if step % 200 == 0 or step >= steps:
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                        "log": json.dumps(log),
                    },
                    state.with_suffix(".partial"),
                )
                os.replace(state.with_suffix(".partial"), state)
                save_checkpoint(model, output)


if __name__ == "__main__":
    main()
