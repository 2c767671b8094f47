"""The pocket model in training: both towers as they are exported, and three heads that are dropped afterwards."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import numpy as np
import torch
from lessons import (
    BLOCK,
    CELLS,
    CLASSES,
    IGNORE,
    PAGE,
    PLACES,
    Item,
    blocks,
    cells_of,
    page,
    places_of,
    runs_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ppexport.exporters.decoders import attention
from ppexport.exporters.lowering import ops
from ppexport.exporters.random_checkpoint import random_config
from ppexport.exporters.towers import qwen_vit
from ppexport.models import qwen3_vl
from ppexport.models.config import ModelConfig

LOOKS = {2: 2, 3: 2}  # layer: one of its attention heads, taught to look at what the answer is read from
WORTH = {
    "yesno": 4.0
}  # of a token of an answer, 1 where not given: "yes" is one token among many of other answers


def pocket_config() -> dict[str, Any]:
    """config.json of the pocket model."""
    config = random_config("qwen3_vl", "pocket")
    config["text_config"]["max_position_embeddings"] = 2048
    config["vision_config"]["num_position_embeddings"] = 256
    return config


class Pocket(nn.Module):
    """Both towers, two heads that read characters, and one that says where in the picture a merged token lies.

    Without the last one the embeddings carry no places for long, and ``locate`` is not learned.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tower = qwen_vit.Tower(config)
        self.decoder = attention.Decoder(config)
        self.image_token = config.image_token
        self.patch_head = nn.Sequential(
            nn.LayerNorm(config.vision.width), nn.Linear(config.vision.width, CELLS * CLASSES)
        )
        self.token_head = nn.Linear(config.text.width, 4 * CELLS * CLASSES)
        self.place_head = nn.Linear(config.text.width, 2 * PLACES)
        self.inputs: dict[int, tuple[Tensor, ...]] = {}  # of the layers that are taught where to look
        for i in LOOKS:
            self.decoder.layers[i].register_forward_pre_hook(functools.partial(self._keep_input, i))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                fan = parameter.shape[0] if "table" not in name and "positions" not in name else 2500
                nn.init.normal_(parameter, 0.0, min(0.06, fan**-0.5))
        _look_at_neighbours(self.tower)
        fixed = qwen_vit.constants(config, qwen3_vl.PREPROCESSING)
        for module, values in ((self.tower, fixed), (self.decoder, attention.constants(config))):
            for name, value in values.items():
                module.get_buffer(name).copy_(torch.from_numpy(value))

    def auxiliary_loss(self, hidden: Tensor, embeds: Tensor, cells: Tensor, places: Tensor) -> Tensor:
        """The heads' loss over real patches: hidden [T, width], embeds [K, D], cells [T, CELLS], places [K, 2]."""
        patch = F.cross_entropy(self.patch_head(hidden).reshape(-1, CLASSES), cells.reshape(-1))
        token = F.cross_entropy(self.token_head(embeds).reshape(-1, CLASSES), cells.reshape(-1))
        place = F.cross_entropy(self.place_head(embeds).reshape(-1, PLACES), places.reshape(-1))
        return patch + token + 0.1 * place

    def _keep_input(self, layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs[layer] = args

    def looking_loss(self, items: list[Item]) -> Tensor:
        """Mean -log of the attention that the looking heads pay to what an answer is read from, questions alike."""
        losses = []
        for index, head in LOOKS.items():
            layer, (x, cos, sin, *_) = self.decoder.layers[index], self.inputs[index]
            c, S = layer.c, x.shape[1]
            kv = head * c.kv_heads // c.heads
            q_rows, k_rows = (slice(h * c.head_dim, (h + 1) * c.head_dim) for h in (head, kv))
            h = layer.norm1(x)
            q = layer.q_norm(F.linear(h, layer.q.weight[:, q_rows].t()).unsqueeze(2))
            k = layer.k_norm(F.linear(h, layer.k.weight[:, k_rows].t()).unsqueeze(2))
            q, k = (ops.rotary(v, cos, sin).squeeze(2) for v in (q, k))
            for b, item in enumerate(items):
                for at, seen in item.looks:
                    scores = (q[b, at] @ k[b].t()).float() * c.head_dim**-0.5
                    scores = scores.masked_fill(torch.arange(S) > torch.from_numpy(at)[:, None], -torch.inf)
                    on_it = scores[:, torch.from_numpy(seen)].logsumexp(1)
                    losses.append((scores.logsumexp(1) - on_it).mean())
        return torch.stack(losses).mean() if losses else torch.zeros(())

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
        places = torch.from_numpy(np.tile(places_of(y, x, (2 * rows, 2 * cols)), (batch, 1)))
        return self.auxiliary_loss(hidden, embeds, cells, places), right

    def forward(self, items: list[Item]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(answer loss, auxiliary loss, looking loss, most likely token at every position [B, S]), teacher-forced."""
        B, T, S = len(items), max(len(i.y) for i in items), max(len(i.ids) for i in items)
        pixels, mask = torch.zeros(B, T, 768), torch.zeros(B, T, dtype=torch.bool)
        y, x = torch.zeros(B, T), torch.zeros(B, T)
        ids = torch.zeros(B, S, dtype=torch.int32)
        positions = torch.zeros(3, B, S, dtype=torch.int32)
        targets, worth = torch.full((B, S), IGNORE), torch.zeros(B, S)
        for b, item in enumerate(items):
            t, s = len(item.y), len(item.ids)
            pixels[b, :t], mask[b, :t] = torch.from_numpy(item.pixels).float(), True
            y[b, :t], x[b, :t] = torch.from_numpy(item.y), torch.from_numpy(item.x)
            ids[b, :s], targets[b, :s] = torch.from_numpy(item.ids), torch.from_numpy(item.targets)
            positions[:, b, :s] = torch.from_numpy(item.positions)
            for turn, run in zip(item.turns, runs_of(item.targets), strict=True):
                worth[b, torch.from_numpy(run)] = WORTH.get(turn.skill, 1.0)
        height, width = (torch.tensor([[float(i.grid[a])] for i in items]) for a in (0, 1))
        hidden, levels = self.tower.trunk(pixels.reshape(-1, 768), y, x, height, width, mask)
        real = mask[:, ::4].reshape(-1)
        features = torch.stack([level[real] for level in (self.tower.merger(hidden), *levels)])
        is_image = ids == self.image_token
        rows = torch.where(is_image, is_image.reshape(-1).cumsum(0).reshape(ids.shape) - 1, -1).to(
            torch.int32
        )
        c = self.decoder.c
        cache = torch.zeros(B, c.kv_heads, S, c.head_dim)
        at = torch.arange(S, dtype=torch.int32).expand(B, S)
        start = torch.zeros(B, dtype=torch.int32)
        logits, *_ = self.decoder(ids, features, rows, positions, start, at, [cache] * (2 * c.layers))
        losses = F.cross_entropy(
            logits.reshape(-1, c.vocab), targets.reshape(-1), ignore_index=IGNORE, reduction="none"
        )
        loss = (losses * worth.reshape(-1)).sum() / worth.sum()
        cells = torch.from_numpy(np.concatenate([i.cells for i in items]))
        places = torch.from_numpy(np.concatenate([places_of(i.y, i.x, i.grid) for i in items]))
        auxiliary = self.auxiliary_loss(hidden[mask.reshape(-1)], features[0], cells, places)
        return loss, auxiliary, self.looking_loss(items), logits.argmax(-1)


def _look_at_neighbours(tower: qwen_vit.Tower, strength: float = 5.0) -> None:
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
