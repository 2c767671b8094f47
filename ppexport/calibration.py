"""A user's images as calibration data: read, pruned as the bundle prunes, and put into a prompt."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .models.config import ModelConfig
from .models.family import Family, Views
from .models.pruners import Pruner, of_family
from .runtime.image import frames_of, images_in
from .runtime.prune import FeaturePruners, kept_of, order_of
from .runtime.selector import Selector, packaged_selector
from .runtime.text import Text
from .runtime.vision import Seen
from .workloads.screens import sample

if TYPE_CHECKING:
    from .exporters.bundle import Plan
    from .exporters.run_model import Asked, Sample

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
        from .exporters.text_files import special_tokens

        model = plan.checkpoint.config
        has_text = (directory / "tokenizer.json").is_file()
        text = Text(directory, model.image_token, special_tokens(plan.checkpoint)) if has_text else None
        stages = _Stages.of(plan)
        found = []
        for file in self.files():
            frames, shown = frames_of(file, partial(plan.checkpoint.family.views, model, plan.preprocessing))
            ids = prompt_ids(text, model, self.question, [shown.placeholders])
            found.append(stages.sample(frames, shown, ids))
        return found


@dataclass(frozen=True, eq=False)
class _Stages:
    """The pruners of a bundle that is being built, and how its family lays prompts out."""

    family: Family
    model: ModelConfig
    pruners: tuple[Pruner, ...]
    selector: Selector
    of_features: FeaturePruners

    @classmethod
    def of(cls, plan: Plan) -> _Stages:
        """Raises BackendError without onnxruntime."""
        import onnx_ir as ir

        from .exporters.lowering.dialects import DIALECTS
        from .exporters.pruners import Sizes, pruning_graphs

        model = plan.checkpoint.config
        selector = packaged_selector(model.vision.block)
        pruners = of_family(plan.prune, model.vision.class_token)
        with tempfile.TemporaryDirectory() as folder:
            if any(pruner.after == "vision" for pruner in pruners):
                sizes = Sizes.of(model, ir.DataType.FLOAT)
                for name, graph in pruning_graphs(sizes, DIALECTS["ort"], ("vision",)).items():
                    ir.save(graph, Path(folder) / name)
            of_features = FeaturePruners(selector.backend, Path(folder), model.vision.block)
            of_features.load(pruners)
        return cls(plan.checkpoint.family, model, pruners, selector, of_features)

    def sample(self, frames: Sequence[np.ndarray], shown: Views, ids: np.ndarray) -> Sample:
        """An image, and the tokens [S] of a prompt about it."""
        from .exporters.run_model import Look, Sample

        looks = []
        keeps = []
        made = self.selector.looks(frames, shown, self.pruners)
        for view, (pixels, _, selection) in zip(shown.views, made, strict=True):
            keeps.append(selection.keep[view.rows_wanted(selection.keep)])
            if len(keeps[-1]):
                looks.append(Look(self.selector.backend.download(pixels), view, selection.keep))
        return Sample(tuple(looks), partial(self._lay_out, shown, keeps, ids))

    def _lay_out(
        self,
        shown: Views,
        keeps: Sequence[np.ndarray],
        ids: np.ndarray,
        seen: Sequence[dict[str, np.ndarray]],
    ) -> Asked:
        """The prompt once the tower has seen every view of which ``keeps`` keeps anything."""
        from .exporters.run_model import Asked, joined

        backend = self.selector.backend
        later = [pruner for pruner in self.pruners if pruner.after == "vision"]
        views = [{name: backend.upload(values) for name, values in view.items()} for view in seen]
        left = self.of_features.prune([Seen(view.pop("features"), view) for view in views], later)
        of_views = iter(left)
        kept = [keep[next(of_views).rows] if len(keep) else keep for keep in keeps]
        prompt = self.family.layout(self.model, ids, [kept_of(kept, shown, *order_of(left))])
        features = joined([backend.download(view.features).copy() for view in left], seen)
        return Asked(prompt.ids, prompt.feature_rows, np.ascontiguousarray(prompt.positions), features)


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
