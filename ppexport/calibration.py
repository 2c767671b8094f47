"""A user's images as calibration data: read, pruned as a bundle prunes pixels, and put into a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .models.config import ModelConfig
from .runtime.image import frames_of, images_in
from .runtime.prune import kept_of
from .runtime.selector import packaged_selector
from .runtime.text import Text
from .workloads.screens import sample

if TYPE_CHECKING:
    from .exporters.bundle import Plan
    from .exporters.run_model import Sample

QUESTION = "Describe this image in detail."
SCREENS = (("transcribe", 1), ("locate", 2), ("yesno", 3))  # skill and seed, drawn at up to 640 x 480 pixels


@dataclass(frozen=True)
class Calibration:
    """Images, each a file or a folder of them, and a question that is asked about each of them."""

    images: Sequence[str | Path]
    question: str = QUESTION

    def files(self) -> list[Path]:
        """The images; raises ImageError for a path that is none, and for a folder without any."""
        return images_in(self.images)

    def samples(self, plan: Plan, directory: Path) -> list[Sample]:
        """``directory``: holds tokenizer.json and chat_template.jinja, if there are any.

        Raises ImageError, RequestError, BackendError (pruning needs onnxruntime).
        """
        from .exporters.run_model import Look, Sample
        from .exporters.text_files import special_tokens

        model = plan.checkpoint.config
        family = plan.checkpoint.family
        has_text = (directory / "tokenizer.json").is_file()
        text = Text(directory, model.image_token, special_tokens(plan.checkpoint)) if has_text else None
        selector = packaged_selector(model.vision.block)
        found = []
        for file in self.files():
            frames, shown = frames_of(file, partial(family.views, model, plan.preprocessing))
            looks = []
            keeps = []
            made = selector.looks(frames, shown, plan.prune)
            for view, (pixels, _, selection) in zip(shown.views, made, strict=True):
                keeps.append(selection.keep[view.rows_wanted(selection.keep)])
                if len(keeps[-1]):
                    looks.append(Look(selector.backend.download(pixels), view, selection.keep))
            ids = prompt_ids(text, model, self.question, [shown.placeholders])
            prompt = family.layout(model, ids, [kept_of(keeps, shown)])
            found.append(Sample(tuple(looks), prompt.ids, prompt.feature_rows, prompt.positions))
        return found


def synthetic_screens(block: int) -> np.ndarray:
    """Generated screens below each other, cut to whole blocks: uint8 [H, W, 3]. Every fp16 model is tried on them."""
    images = [sample(skill, seed).image for skill, seed in SCREENS]
    width = max(image.width for image in images)
    height = sum(image.height for image in images)
    canvas = Image.new("RGB", (width // block * block, height // block * block), "white")
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    return np.array(canvas)


def prompt_ids(text: Text | None, model: ModelConfig, question: str, totals: Sequence[int]) -> np.ndarray:
    """Token ids int32 [S] of a question about images with so many tokens; without a tokenizer any tokens."""
    if text is not None:
        return text.encode(question, totals)
    words = np.random.default_rng(0).choice(np.delete(np.arange(model.text.vocab), model.image_token), 16)
    runs = [np.append(np.full(n, model.image_token), words[:1]) for n in totals]
    return np.concatenate([*runs, words]).astype(np.int32)
