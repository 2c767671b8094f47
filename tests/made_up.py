"""A family that no tool has ever trained, in one file: two rotary axes, one state more, no deepstack, a placeholder of
its own. With the decoder of its own architecture, which would be a file in exporters/decoders.

Every token is mixed with the one before it, so a sequence remembers the last embedding: ``last`` [slots, D]. It cannot
be cut back to a shorter sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppexport.exporters.decoders import attention
from ppexport.models.config import ModelConfig, Rope, State, Weight
from ppexport.models.family import Kept, Placed, Prompt
from ppexport.models.layout import lay_out
from ppexport.models.qwen3_vl import Qwen3VL

PLACEHOLDER = 77


class MadeUp(Qwen3VL):
    """What it does not say is as in Qwen3-VL."""

    model_type = "made_up"

    def parse(self, raw: Mapping[str, Any], notices: list[str] | None = None) -> ModelConfig:
        model = super().parse(raw, notices)
        text = replace(model.text, rope=Rope(theta=1000.0, sections=(2, 2), width=8))
        last = State("last", ("slots", text.width), rewindable=False)
        return replace(
            model,
            family=self.model_type,
            decoder="mixing",
            text=text,
            vision=replace(model.vision, deepstack=()),
            states=(*text.states(), last),
            image_token=PLACEHOLDER,
        )

    def weights(self, model: ModelConfig) -> dict[str, dict[str, Weight]]:
        tables = super().weights(model)
        tables["language"]["mix"] = Weight("model.language_model.mix", (model.text.width,))
        return tables

    def layout(self, model: ModelConfig, ids: np.ndarray, kept: Sequence[Kept]) -> Prompt:
        return lay_out(ids, model.image_token, kept, model.axes, _rows_and_columns)


def _rows_and_columns(image: Kept) -> Placed:
    """Text goes on after the last row."""
    (view,) = image.shown.views
    n = len(image.keep)
    return Placed(np.arange(n), np.stack(np.divmod(image.keep, view.grid[1])), view.grid[0], n)


class Decoder(attention.Decoder):
    """x_t + mix * x_(t-1) at the input of the first layer."""

    def __init__(self, model: ModelConfig, *given: Any):
        super().__init__(model, *given)
        self.mix = nn.Parameter(torch.empty(model.text.width, dtype=self.dtype))

    def hidden(
        self,
        input_ids: Tensor,
        features: Tensor,
        feature_rows: Tensor,
        position_ids: Tensor,
        start: Tensor,
        logits_at: Tensor,
        states: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        *caches, last = states
        x = self.embed(input_ids, features, feature_rows)
        before = torch.cat((last.unsqueeze(1).to(x.dtype), x[:, :-1]), dim=1)
        mixed, caches = self.attend(
            x + before * self.mix, features, feature_rows, position_ids, start, logits_at, caches
        )
        return mixed, [*caches, x[:, -1].to(last.dtype)]


def decoder() -> ModuleType:
    """As a file of exporters/decoders would be imported."""
    module = ModuleType("mixing")
    module.Decoder = Decoder  # type: ignore[attr-defined]
    module.constants = attention.constants  # type: ignore[attr-defined]
    return module
