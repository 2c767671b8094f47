"""What a checkpoint computes in float32: the towers that are exported, run in torch.

Bundles are held against it (ppexport/verify.py), four bits are fitted to what its matrices are multiplied with
(weights/gptq.py), and its largest values say what float16 graphs must calculate in float32 (fp16_range.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..models.config import Preprocessing
from ..models.family import View
from ..models.progress import Progress, silent
from .checkpoint import Checkpoint
from .decoders import DECODERS
from .layers import Linear
from .towers import TOWERS
from .weights.layer_streaming import streamed

OnInput = Callable[[str, str, Tensor], None]  # graph, weight [in, out], what it is multiplied with [..., in]


@dataclass(frozen=True)
class Look:
    """One run of the vision tower."""

    pixels: np.ndarray  # uint8 [H, W, 3] of the view
    view: View
    keep: np.ndarray  # int32 [K], which of its tokens the tower sees


@dataclass(frozen=True)
class Asked:
    """What the decoder gets: a prompt, and the features that stand in it."""

    ids: np.ndarray  # int32 [S] without the placeholders of dropped tokens
    feature_rows: np.ndarray  # int32 [S], the row of the features that stands there, -1 for text
    positions: np.ndarray  # int32 [A, S]
    features: np.ndarray  # float32 [1 + L, K, D]


@dataclass(frozen=True)
class Sample:
    """One image and a prompt about it."""

    looks: tuple[Look, ...]
    lay_out: Callable[[Sequence[dict[str, np.ndarray]]], Asked]  # given what the tower made of each look


class EagerModel:
    """The towers of a checkpoint in torch, one layer in memory at a time: the one way to run them without an export.

    ``pre``: how a bundle prepares images; ``stage``: what ``progress`` is told that this is for; ``on_input`` is shown
    the inputs of every linear layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pre: Preprocessing,
        stage: str,
        progress: Progress = silent,
        on_input: OnInput = lambda graph, weight, x: None,
    ):
        self.checkpoint = checkpoint
        self.pre = pre
        self.stage = stage
        self.progress = progress
        self.on_input = on_input

    def asked(self, sample: Sample) -> Asked:
        """Run the vision tower on a sample's image, if it has one."""
        return sample.lay_out(self.seen(sample.looks) if sample.looks else [])

    @torch.no_grad()
    def seen(self, looks: Sequence[Look]) -> list[dict[str, np.ndarray]]:
        """Of each view, what the vision graph gives: output -> float32."""
        model = self.checkpoint.config
        with torch.device("meta"):
            tower = TOWERS[model.tower].Tower(model)
        names = ["features", *(output.name for output in model.other_outputs)]
        found = []
        for i, look in enumerate(looks):
            constants = TOWERS[model.tower].constants(model, self.pre)
            steps = self._steps(f"image {i + 1}", model.vision.depth)
            others = self.checkpoint.family.tower_inputs(model, look.view, look.keep)
            with (
                self._shown("vision", tower),
                streamed(self.checkpoint, tower, "vision", "blocks", constants, steps),
            ):
                given = {"image": look.pixels, "keep": look.keep, **others}
                made = tower(**{name: torch.from_numpy(np.array(x)) for name, x in given.items()})
            values = made if isinstance(made, tuple) else (made,)
            found.append({name: value.numpy() for name, value in zip(names, values, strict=True)})
        return found

    def logits(self, asked: Asked, last: int) -> np.ndarray:
        """The logits of the ``last`` positions, float32 [last, V]; the last layer runs at those alone."""
        return self._decode(asked, last, head=True).numpy()

    def decode(self, asked: Asked) -> None:
        """Run every layer at every position, for those who look on."""
        self._decode(asked, len(asked.ids), head=False)

    @torch.no_grad()
    def _decode(self, asked: Asked, last: int, head: bool) -> Tensor:
        """What comes out of the last layer at the ``last`` positions [last, D], or with the head their logits."""
        model = self.checkpoint.config
        S = len(asked.ids)
        with torch.device("meta"):
            decoder = DECODERS[model.decoder].Decoder(model)
        constants = DECODERS[model.decoder].constants(model)
        steps = self._steps("language", model.text.layers)
        with (
            self._shown("language", decoder),
            streamed(self.checkpoint, decoder, "language", "layers", constants, steps),
        ):
            x, _ = decoder.hidden(
                torch.from_numpy(asked.ids)[None],
                torch.from_numpy(asked.features),
                torch.from_numpy(asked.feature_rows)[None],
                torch.from_numpy(asked.positions)[:, None],
                torch.zeros(1, dtype=torch.int32),
                torch.arange(S - last, S, dtype=torch.int32)[None],
                [torch.zeros(*state.sized(slots=1, capacity=S)) for state in model.states],
            )
            out: Tensor = decoder.logits(x) if head else x
        return out[0]

    @contextmanager
    def _shown(self, graph: str, module: nn.Module) -> Iterator[None]:
        """Inside, linear layers show their inputs."""
        hooks = []
        for path, child in module.named_modules():
            if isinstance(child, Linear):
                weight = f"{path}.weight"
                shown = partial(self.on_input, graph, weight)
                hooks.append(child.register_forward_pre_hook(lambda _, args, shown=shown: shown(args[0])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _steps(self, phase: str, total: int) -> Callable[[], None]:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.progress(f"{self.stage}: {phase}", done, total)

        return step


def joined(features: Sequence[np.ndarray], seen: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """Features of all views of an image, float32 [1 + L, K, D]; what ends its rows, if there is that, last."""
    return np.concatenate([*features, *newline_of(seen)], axis=1)


def newline_of(seen: Sequence[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """What ends the rows of an image, [1 + L, 1, D], where there is that, from what the tower made of its views."""
    return [seen[0]["newline"]] if "newline" in seen[0] else []
