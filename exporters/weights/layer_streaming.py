"""The towers in torch and float32 with the weights of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ...models.config import Weight
from ..checkpoint import Checkpoint


@contextmanager
def streamed(
    checkpoint: Checkpoint,
    module: nn.Module,
    graph: str,
    layers: str,
    constants: dict[str, np.ndarray],
    step: Callable[[], None],
) -> Iterator[None]:
    """Inside, ``module`` (on the meta device) has its weights in float32, each of its ``layers`` only while it runs."""
    table: dict[str, Weight] = checkpoint.family.weights(checkpoint.config)[graph]

    def fill(prefix: str) -> None:
        for path, weight in table.items():
            if path.startswith(prefix) and (prefix or not path.startswith(f"{layers}.")):
                owner, _, name = path.rpartition(".")
                value = nn.Parameter(checkpoint.read(weight).float(), requires_grad=False)
                setattr(module.get_submodule(owner), name, value)

    def leave(layer: nn.Module) -> None:
        layer.to("meta")
        step()

    fill("")
    for name, value in constants.items():
        module.register_buffer(name, torch.from_numpy(value))
    hooks = []
    for i, layer in enumerate(module.get_submodule(layers).children()):
        hooks.append(layer.register_forward_pre_hook(lambda _, __, prefix=f"{layers}.{i}.": fill(prefix)))
        hooks.append(layer.register_forward_hook(lambda child, *_: leave(child)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        module.to("meta")
