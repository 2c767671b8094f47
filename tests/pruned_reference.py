"""What transformers computes of the kept patches alone: its own layers in a row, with positions of the full grid.

Written from the models' forward methods, without any of this project's code: windows are collected patch by patch.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import vision_utils


@torch.no_grad()
def features(model: Any, pixel_values: Tensor, grid: Tensor, keep: np.ndarray) -> list[Tensor]:
    """One image: pixel_values of all patches, grid [1, 3], keep [K] merged tokens -> embeddings, deepstack levels."""
    tower = model.model.visual
    merge = tower.spatial_merge_size
    patches = torch.tensor([token * merge**2 + i for token in keep.tolist() for i in range(merge**2)])
    hidden = tower.patch_embed(pixel_values[patches])
    if hasattr(tower, "pos_embed"):
        corners, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode="bilinear",
            align_corners=True,
            spatial_merge_size=merge,
        )
        hidden = hidden + (tower.pos_embed(corners) * weights[:, :, None]).sum(1)[patches]
    turns = tower.rotary_pos_emb(hidden, vision_utils.get_vision_position_ids(grid, merge)[patches])
    everything = torch.tensor([0, len(patches)])
    levels = []
    for number, block in enumerate(tower.blocks):
        if number in getattr(tower, "fullatt_block_indexes", range(len(tower.blocks))):
            hidden = block(hidden, cu_seqlens=everything, position_embeddings=turns)
        else:
            out = torch.empty_like(hidden)
            for rows in _windows(tower, int(grid[0, 2]) // merge, keep):
                part = torch.tensor(rows)
                own = tuple(turn[part] for turn in turns)
                out[part] = block(
                    hidden[part], cu_seqlens=torch.tensor([0, len(rows)]), position_embeddings=own
                )
            hidden = out
        if number in getattr(tower, "deepstack_visual_indexes", ()):
            levels.append(tower.deepstack_merger_list[len(levels)](hidden))
    return [tower.merger(hidden), *levels]


def _windows(tower: Any, columns: int, keep: np.ndarray) -> list[list[int]]:
    """Patches of the kept ones, by window."""
    merge = tower.spatial_merge_size
    side = tower.window_size // merge // tower.patch_size
    found = defaultdict(list)
    for at, token in enumerate(keep.tolist()):
        row, column = divmod(token, columns)
        found[row // side, column // side] += range(at * merge**2, (at + 1) * merge**2)
    return list(found.values())


@torch.no_grad()
def logits(
    model: Any,
    ids: np.ndarray,
    image_token: int,
    grids: Tensor,
    keeps: list[np.ndarray],
    shown: list[list[Tensor]],
    answer: list[int],
) -> np.ndarray:
    """The whole sequence at once: ids [S'] with full grids, ``shown``: features of each image, then what was answered.

    Returns float32 [1 + answer, V]: the logits of the first token and of each that follows.
    """
    tokens = torch.tensor(ids)[None]
    positions, _ = model.model.get_rope_index(tokens, (tokens == image_token).int(), image_grid_thw=grids)
    wanted = np.ones(len(ids), bool)
    where = np.flatnonzero(ids == image_token)
    done = 0
    merge = model.model.visual.spatial_merge_size
    for grid, keep in zip(grids.tolist(), keeps, strict=True):
        total = grid[0] * grid[1] * grid[2] // merge**2
        own = where[done : done + total]
        wanted[own] = False
        wanted[own[keep]] = True
        done += total
    left = torch.tensor(np.concatenate([ids[wanted], answer]).astype(np.int64))
    after = int(positions.max()) + 1 + torch.arange(len(answer))
    places = torch.cat([positions[:, 0, torch.tensor(wanted)], after.expand(3, -1)], dim=1)[:, None]
    embeds = model.get_input_embeddings()(left)
    is_image = left == image_token
    is_image[int(wanted.sum()) :] = False
    embeds[is_image] = torch.cat([levels[0] for levels in shown])
    more: dict[str, Any] = {}
    if len(shown[0]) > 1 or hasattr(model.model.visual, "deepstack_merger_list"):
        more["visual_pos_masks"] = is_image[None]
        more["deepstack_visual_embeds"] = [
            torch.cat(level) for level in zip(*(s[1:] for s in shown), strict=True)
        ]
    hidden = model.model.language_model(
        inputs_embeds=embeds[None], position_ids=places, use_cache=False, **more
    ).last_hidden_state
    found = model.lm_head(hidden[0, len(left) - 1 - len(answer) :])
    return found.numpy()
