"""First token of LLaVA models with PruneSID against all tokens, beside the authors' selection in transformers.

    python bench/first_token_llava.py -o bench/results/first_token_llava_300m.json [--reference PATH_OF_PRUNESID]

Random weights of a shape (--shape: "300m" or "7b"), LLaVA-1.5 (576 tokens, budgets 64, 128, 192) and LLaVA-NeXT (a
picture in five views, 2880 tokens; 160, 320, 640); and a desktop with PixelPrune before the tower, alone and with the
smallest budget after it. The other side is transformers' model in torch with the selection
out of the authors' checkout, from pixels to the first token's logits, as their own code runs it. In turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import build, random_checkpoint
from machine import describe
from prunesid import Reference

import ppexport

BUDGETS = {"llava": (192, 128, 64), "llava_next": (640, 320, 160)}
SIDES = {"llava": 336, "llava_next": 672}  # of the picture, in pixels
QUESTION = 30  # tokens of text
DESKTOP = Path(__file__).parent.parent / "ppexport" / "bench" / "images" / "gui_mousepad.png"


class Theirs:
    """transformers' model with the authors' selection."""

    def __init__(self, family: str, checkpoint: Path, reference: Path, dtype: torch.dtype):
        kinds = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
        self.model: Any = (
            kinds[family]
            .from_pretrained(
                checkpoint, dtype=dtype, attn_implementation={"vision_config": "eager", "text_config": "sdpa"}
            )
            .eval()
        )
        self.select = Reference(reference).forward
        self.dtype = dtype

    @torch.no_grad()
    def first_token(self, crops: torch.Tensor, ids: torch.Tensor, budget: int | None) -> int:
        """crops [n, 3, 336, 336] normalised, ids [S] of text; ``budget``: of all crops, None for all tokens."""
        inner = self.model.model
        crops = crops.to(self.dtype)
        if budget is None:
            seen = inner.vision_tower(crops, output_hidden_states=True).hidden_states[-2][:, 1:]
        else:
            tower = SimpleNamespace(
                device="cpu",
                dtype=self.dtype,
                need_token_num=budget // len(crops),
                vision_tower=lambda pixels, **_: inner.vision_tower(
                    pixels, output_hidden_states=True, output_attentions=True
                ),
            )
            seen, _ = self.select(tower, crops)
        image = inner.multi_modal_projector(seen.to(self.dtype)).flatten(0, 1)
        text = self.model.get_input_embeddings()(ids)
        embeds = torch.cat([text[:5], image, text[5:]])[None]
        hidden = inner.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
        return int(self.model.lm_head(hidden[:, -1]).argmax())


def measured(family: str, shape: str, precisions: list[str], reference: Path | None, runs: int) -> list[Any]:
    side = SIDES[family]
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(shape, Path(folder), family)
        runners: dict[tuple[str, int | str | None], Callable[[], dict[str, float]]] = {}
        for precision in precisions:
            pipe = ppexport.load(build(checkpoint, Path(folder), precision), reuse=0)
            rng = np.random.default_rng(1)
            text = rng.integers(10, 1000, QUESTION)
            placeholders = pipe.pixels(image)[1].placeholders
            ids = np.concatenate([text[:5], np.full(placeholders, pipe.manifest.model.image_token), text[5:]])
            for budget in (None, *BUDGETS[family]):

                def ours(pipe: Any = pipe, ids: Any = ids, budget: int | None = budget) -> dict[str, float]:
                    stats = ppexport.Stats()
                    prune = None if budget is None else ppexport.PruneSID(budget)
                    next(pipe.generate_tokens(ids, [image], prune, max_new_tokens=1, stats=stats))
                    return {"first": stats.ttft, "prompt": stats.prompt_tokens, **stats.milliseconds}

                runners[precision, budget] = ours
            several = BUDGETS[family][-1]
            for what, prune in (
                ("all", None),
                ("pixels", ppexport.PixelPrune()),
                ("both", [ppexport.PixelPrune(), ppexport.PruneSID(several)]),
            ):

                def desktop(pipe: Any = pipe, prune: Any = prune) -> dict[str, float]:
                    answer = pipe.generate("What is this?", [DESKTOP], prune, max_new_tokens=1)
                    answer.text()
                    found = answer.stats
                    return {"first": found.ttft, "prompt": found.prompt_tokens, **found.milliseconds}

                runners[f"{precision}, a desktop", what] = desktop
        if reference:
            theirs = Theirs(family, checkpoint, reference, torch.bfloat16)
            count = len(pipe.pixels(image)[1].views)
            crops = torch.randn(count, 3, 336, 336)
            for budget in (None, *BUDGETS[family]):

                def run(budget: int | None = budget) -> dict[str, float]:
                    begin = time.perf_counter()
                    theirs.first_token(crops, torch.from_numpy(text), budget)
                    return {"first": (time.perf_counter() - begin) * 1e3}

                runners["authors, bfloat16", budget] = run
        found: dict[tuple[str, int | str | None], list[dict[str, float]]] = {key: [] for key in runners}
        for i in range(runs + 1):  # the first one warms up
            for key, runner in runners.items():
                once = runner()
                if i:
                    found[key].append(once)
        for (what, budget), several in found.items():
            row: dict[str, Any] = {"family": family, "what": what, "budget": budget}
            row |= {name: round(median(each[name] for each in several), 1) for name in several[0]}
            row["times_as_fast"] = round(
                median(each["first"] for each in found.get((what, None)) or found[what, "all"])
                / max(row["first"], 1e-9),
                2,
            )
            rows.append(row)
            click.echo(json.dumps(row))
    return rows


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path, exists=True), help="A checkout of PruneSID.")
@click.option("--shape", default="300m", show_default=True)
@click.option("--family", "families", multiple=True, default=("llava", "llava_next"), show_default=True)
@click.option("--precisions", default="int4,w8a8", show_default=True)
@click.option("--runs", default=5, show_default=True)
def main(
    output: Path, reference: Path | None, shape: str, families: tuple[str, ...], precisions: str, runs: int
) -> None:
    """Measure and write a JSON file."""
    rows = []
    for family in families:
        rows += measured(family, shape, precisions.split(","), reference, runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        json.dumps({"machine": describe(), "shape": shape, "runs": runs, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
