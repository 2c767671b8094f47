"""LLaVA-1.5 and LLaVA-NeXT beyond parity: pictures, prompts, budgets, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGES, write_json
from invariants import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from terminal import runner
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

import ppexport
from ppexport import plan as planner
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.models import profiles
from ppexport.models.errors import CheckpointError, RequestError
from ppexport.models.families import FAMILIES
from ppexport.models.family import Kept
from ppexport.models.pruners.prunesid import shared_out
from ppexport.overlay import GAP, overlay
from ppexport.runtime.bundle import open_bundle
from ppexport.runtime.image import frames_of

SIDE = 84
GRID = SIDE // 14
SIZES = [(60, 40), (84, 84), (85, 300), (400, 90), (200, 201), (500, 333), (2, 60), (83, 168), (1000, 30)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in ("llava", "llava_next"):
        write_random(random_config(family, "tiny", "float32"), folder / family)
        write_text_files(folder / family, family)
    return folder


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def pipe(request: pytest.FixtureRequest, checkpoints: Path) -> ppexport.Pipeline:
    return loaded(checkpoints, request.param)


def loaded(checkpoints: Path, family: str) -> ppexport.Pipeline:
    target = checkpoints / f"{family}.bundle"
    return ppexport.load(target if target.exists() else build(checkpoints / family, target))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# ------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("edge", "pad"), [(SIDE, False), (60, False), (100, False), (SIDE, True)])
def test_the_middle_of_an_image_is_that_of_transformers(size: tuple[int, int], edge: int, pad: bool) -> None:
    image = picture(*size)
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": SIDE, "width": SIDE}, do_pad=pad
    )
    theirs = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    mine = seen_of("llava", image, shortest_edge=edge, pad_to_square=pad)[0]
    assert (mine == theirs.transpose(1, 2, 0)).all()


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers(size: tuple[int, int]) -> None:
    """All that show anything of the image; and a prompt has as many placeholders."""
    image = picture(*size)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=config_of("llava_next")["image_grid_pinpoints"],
    )
    theirs = list(processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0])
    mine = seen_of("llava_next", image)
    assert (mine[0] == theirs[0].transpose(1, 2, 0)).all()
    for view in mine[1:]:
        while not (view == theirs[1].transpose(1, 2, 0)).all():
            theirs.pop(1)  # shows padding only
        theirs.pop(1)
    shown = views_of("llava_next", *size)
    told = SimpleNamespace(image_processor=processor, patch_size=14, num_additional_image_tokens=0)
    told._get_unpadded_features = lambda *a: LlavaNextProcessor._get_unpadded_features(told, *a)
    assert shown.placeholders == LlavaNextProcessor._get_number_of_features(told, *size, SIDE, SIDE)


def config_of(family: str) -> dict[str, Any]:
    return random_config(family, "tiny")


def views_of(family: str, height: int, width: int, **settings: Any) -> Any:
    known = FAMILIES[family]
    pre = replace(known.preprocessing, **settings)
    return known.views(known.parse(config_of(family)), pre, height, width)


def seen_of(family: str, image: np.ndarray, **settings: Any) -> list[np.ndarray]:
    frames, shown = frames_of(image, lambda h, w: views_of(family, h, w, **settings))
    return [
        frames[view.frame][view.box[0] : view.box[0] + SIDE, view.box[1] : view.box[1] + SIDE]
        for view in shown.views
    ]


# ------------------------------------------------------------------------------------------------------ prompts


def test_rows_of_tiles_end_where_they_keep_anything() -> None:
    """Two by two tiles of which three rows keep something: the whole first, then each row across both tiles."""
    shown = views_of("llava_next", 168, 168)
    assert len(shown.views) == 5
    total = GRID * GRID
    keep = [3, 7, total + 2, total + 9, 2 * total + 0, 4 * total + 5]
    image = Kept(np.array(keep, np.int32), shown)
    placed = FAMILIES["llava_next"].place(image)  # type: ignore[attr-defined]
    # rows of features: 0 1 whole, 2 3 first tile, 4 second, 5 last tile, 6 the end of a row
    assert placed.rows.tolist() == [0, 1, 2, 4, 6, 3, 6, 5, 6]
    assert placed.positions.tolist() == [list(range(9))]
    assert (placed.advance, placed.count) == (9, 7)
    grouped = FAMILIES["llava_next"].place(Kept(np.array(keep, np.int32), shown, True, True))  # type: ignore[attr-defined]
    assert (grouped.rows.tolist(), grouped.count) == (list(range(10)), 11)  # one view keeps nothing


def test_a_view_that_keeps_nothing_has_no_class_token(checkpoints: Path) -> None:
    """PixelPrune may keep only what was put around the image in a tile; then features and places still agree."""
    pipe = loaded(checkpoints, "llava_next")
    image = np.zeros((120, 168, 3), np.uint8)
    image[-30:, -40:] = picture(30, 40)
    prune = [ppexport.PixelPrune(), ppexport.PruneSID(20, order="reference")]
    token = pipe.manifest.model.image_token
    run = [token] * pipe.pixels(image)[1].placeholders
    sequence = pipe.prepare_tokens([5, *run, 6, *run, 7], [image, image], prune)
    assert min(selection.kept for selection in sequence.pictures[0].selections) == 0
    counts = [pipe.engine.features(each).shape[1] for each in sequence.pictures]
    rows = sequence.prompt.feature_rows
    assert sequence.prompt.first_rows.tolist() == [0, counts[0]]
    assert rows.max() < sum(counts)
    assert counts[0] - 1 not in rows  # the end of a row
    assert (rows >= 0).sum() <= 40


def test_what_the_tower_saw_counts_for_reuse(checkpoints: Path) -> None:
    """PixelPrune may drop nothing but padding: the same tokens, seen otherwise."""
    image = picture(100, 140)
    pipe = loaded(checkpoints, "llava_next")
    alone = pipe.encode(image, ppexport.PixelPrune()).features
    pipe.engine.forget()
    whole = pipe.encode(image, None).features
    after = pipe.encode(image, ppexport.PixelPrune()).features
    assert (after == alone).all()
    if whole.shape == alone.shape:
        assert (whole != alone).any()


def test_rows_without_columns_end_all_the_same() -> None:
    """As in transformers, where an image is so narrow that its tiles keep no column."""
    shown = views_of("llava_next", 5000, 30)
    grid = GRID * GRID
    assert (len(shown.views), shown.placeholders) == (1, grid + 18)
    placed = FAMILIES["llava_next"].place(Kept(np.arange(grid, dtype=np.int32), shown))  # type: ignore[attr-defined]
    assert placed.rows.tolist() == [*range(grid), *[grid] * 18]


def test_text_goes_on_right_after_what_is_kept(pipe: ppexport.Pipeline) -> None:
    token = pipe.manifest.model.image_token
    image = picture(150, 200)
    ids = [5, *[token] * pipe.pixels(image)[1].placeholders, 6, 7]
    prompt = pipe.prepare_tokens(ids, [image], ppexport.PruneSID(20)).prompt
    assert len(prompt.ids) < len(ids)
    assert prompt.positions.tolist() == [list(range(len(prompt.ids)))]
    assert prompt.next_position == len(prompt.ids)


# ------------------------------------------------------------------------------------------------------ PruneSID


@pytest.mark.parametrize("budget", [1, 5, 17, 35])
def test_the_class_token_scores(checkpoints: Path, budget: int) -> None:
    """The tower gives transformers' own hidden states and attention; what is kept is what is kept of those."""
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoints / "llava", attn_implementation="eager", dtype=torch.float32
    ).eval()
    pipe = loaded(checkpoints, "llava")
    pre = pipe.manifest.preprocessing
    image = picture(150, 100, 4)
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    assert pre.mean == tuple(processor.image_mean)
    with torch.no_grad():
        seen = model.model.vision_tower(
            processor(image, return_tensors="pt")["pixel_values"],
            output_hidden_states=True,
            output_attentions=True,
        )
        hidden = seen.hidden_states[-2][0]
        score = seen.attentions[-2][0, :, 0, 1:].sum(0).numpy()
        projected = model.model.multi_modal_projector(hidden).numpy()
    ids = [pipe.manifest.model.image_token] * GRID * GRID
    whole = pipe.prepare_tokens([*ids, 5], [image], None).pictures[0]
    mine = {name: pipe.backend.download(x) for name, x in pipe.engine.seen(whole)[0].others.items()}
    assert relative_error(mine["hidden"], hidden[1:].numpy()) < 1e-4
    assert relative_error(mine["score"], score) < 1e-4
    prune = ppexport.PruneSID(budget)
    keep = ppexport.select_tokens(mine["hidden"], ppexport.PruneSID(budget, "llava"), mine["score"]).keep
    found = pipe.encode(image, prune)
    assert found.keep.tolist() == keep.tolist()
    assert relative_error(found.embeds, projected[1:][keep]) < 1e-4
    if budget > 1:
        grouped = ppexport.PruneSID(budget - 1, "llava", order="reference")
        keep = ppexport.select_tokens(mine["hidden"], grouped, mine["score"]).keep
        found = pipe.encode(image, ppexport.PruneSID(budget, order="reference"))
        assert found.keep.tolist() == keep.tolist()
        assert len(found.embeds) == budget
        assert relative_error(found.embeds, projected[[0, *(keep + 1)]]) < 1e-4


@pytest.mark.parametrize("share", ["even", "information", "each"])
def test_budgets_of_views(checkpoints: Path, share: str) -> None:
    pipe = loaded(checkpoints, "llava_next")
    image = np.full((168, 168, 3), 255, np.uint8)
    image[:84, :84] = picture(84, 84)  # one tile shows something
    found = pipe.encode(image, ppexport.PruneSID(60, share=share))
    kept = [selection.kept for selection in found.selections]
    assert len(kept) == 5
    if share == "each":
        assert kept == [36] * 5  # all there are
    else:
        assert sum(kept) == 60
    if share == "even":
        assert kept == [12] * 5
    if share == "information":
        assert kept[1] == max(kept)
    again = pipe.encode(image, ppexport.PruneSID(60, share=share))
    assert again.keep.tolist() == found.keep.tolist()


def test_shares_are_whole_and_within_bounds() -> None:
    assert shared_out(10, [2, 1, 1], [9, 9, 9], 1) == [5, 3, 2]
    assert shared_out(10, [2, 1, 1], [4, 9, 9], 1) == [4, 3, 3]
    assert shared_out(640, [1.0] * 5, [576] * 5, 1) == [128] * 5
    assert shared_out(50, [1.0, 1.0], [10, 10], 1) == [10, 10]


def test_both_pruners_and_several_images(pipe: ppexport.Pipeline) -> None:
    """Pixels first, then the budget on what is left; the same in a batch, and again out of what is kept."""
    flat = np.full((168, 168, 3), 200, np.uint8)
    flat[60:110, 20:150] = picture(50, 130)
    images = [flat, picture(90, 160)]
    prune = [ppexport.PixelPrune(), ppexport.PruneSID(40)]
    answer = pipe.generate("What?", images, prune, max_new_tokens=5)
    said = answer.text()
    pruners = {each.pruner for selection in answer.stats.images for each in selection.dropped}
    assert pruners == {"pixelprune", "prunesid"}
    assert sum(s.kept for s in answer.stats.images) <= 80
    again, alone = pipe.generate_batch(
        [ppexport.Request("What?", images, prune, 5), ppexport.Request("And?", images[:1], None, 3)]
    )
    assert again.text() == said
    assert again.stats.reused_tokens > 0
    assert alone.text() == pipe.generate("And?", images[:1], None, max_new_tokens=3).text()


def test_pictures_of_all_views(checkpoints: Path, tmp_path: Path) -> None:
    """Side by side, as the model sees them; what was put around the image is neither kept nor dropped."""
    pipe = loaded(checkpoints, "llava_next")
    image = np.full((130, 168, 3), 90, np.uint8)
    image[40:80, 30:90] = picture(40, 60)
    found = pipe.encode(image, [ppexport.PixelPrune(), ppexport.PruneSID(20)])
    drawn = np.asarray(overlay(image, found.selections))
    assert drawn.shape[1] >= SIDE + GAP + 2 * SIDE  # or as wide as its legend
    assert drawn.shape[0] > 2 * SIDE  # and a legend
    assert (drawn[:10, SIDE + GAP : 3 * SIDE + GAP] == 0).all()  # the padding above the tiles
    assert sum(s.total for s in found.selections) < 5 * GRID * GRID
    for selection in found.selections:
        assert sum(each.tokens for each in selection.dropped) == selection.total - selection.kept
    file = tmp_path / "image.png"
    Image.fromarray(image).save(file)
    shown = runner().invoke(
        main,
        [
            "inspect",
            str(file),
            "--bundle",
            str(checkpoints / "llava_next.bundle"),
            "--prunesid",
            "20",
            "--overlay",
            str(tmp_path / "o.png"),
        ],
    )
    assert shown.exit_code == 0, shown.output
    assert "view 5: 84 x 84 pixels" in shown.output
    assert "beside the image" in shown.output
    ran = runner().invoke(
        main,
        [
            "run",
            str(checkpoints / "llava_next.bundle"),
            "Hi",
            "-i",
            str(file),
            "-n",
            "2",
            "--overlay",
            str(tmp_path / "r.png"),
            "--json",
        ],
    )
    assert ran.exit_code == 0, ran.output
    assert [view["view"] for view in json.loads(ran.stdout)["images"]] == [0, 1, 2, 3, 4]
    with Image.open(tmp_path / "r.png") as one, Image.open(tmp_path / "o.png") as other:
        assert min(one.width, other.width) >= 3 * SIDE + GAP


def test_sizes_for_engines_are_those_of_views(checkpoints: Path) -> None:
    """The tower's of a view, the decoder's of a whole image."""
    target = checkpoints / "llava_next.bundle"
    if not target.exists():
        build(checkpoints / "llava_next", target)
    images = [str(IMAGES / "web_gnuplot.png")]
    prune, given = planner.as_bundle(target, "default", {"capacity": 512})
    made = planner.plan(images, prune, **given)
    _, manifest = open_bundle(target)
    profiles.check(made.profiles, manifest.model, manifest.context)
    assert made.profiles.vision[0]["H"] == made.profiles.prune[0]["W"] == (SIDE, SIDE, SIDE)
    assert made.profiles.vision[-1]["K"][2] == GRID * GRID
    pipe = ppexport.load(target)
    assert made.total == (pipe.pixels(images[0])[1].placeholders,)
    assert made.kept == made.total
    with pytest.raises(RequestError, match="sizes of images are given, expected none: a llava_next model"):
        planner.as_bundle(target, "default", {"max_pixels": 4000})


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_names_of_published_checkpoints(checkpoints: Path, tmp_path: Path) -> None:
    """And what the graphs do not compute with: the layers after, and the norm of the class token."""
    for family in ("llava", "llava_next"):
        folder = tmp_path / family
        shutil.copytree(checkpoints / family, folder)
        tensors = load_file(folder / "model.safetensors")
        opened = Checkpoint.open(folder)
        weights = {
            w.source for table in opened.family.weights(opened.config).values() for w in table.values()
        }
        old = {}
        for name, value in tensors.items():
            short = name.removeprefix("model.")
            short = short.replace("language_model.", "language_model.model.")
            short = "language_model.lm_head.weight" if name == "lm_head.weight" else short
            old[short.replace("vision_tower.", "vision_tower.vision_model.")] = value
        vision = "vision_tower.vision_model."
        old[f"{vision}post_layernorm.weight"] = torch.ones(64)
        old[f"{vision}encoder.layers.3.mlp.fc1.weight"] = torch.ones(3, 3)
        old[f"{vision}embeddings.position_ids"] = torch.arange(37)
        save_file(old, folder / "model.safetensors")
        assert set(Checkpoint.open(folder).entries) == weights


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llava", {"vision_feature_select_strategy": "full"}, "strategy is 'full', expected 'default'"),
        (
            "llava",
            {"vision_feature_layer": [-2, -5]},
            r"vision_feature_layer is \[-2, -5\], expected the number",
        ),
        ("llava", {"vision_feature_layer": 0}, "vision_feature_layer is 0, expected one of the 4 layers"),
        ("llava", {"projector_hidden_act": "relu"}, "'projector_hidden_act' is 'relu', expected 'gelu'"),
        ("llava", {"text_config": {"model_type": "gemma"}}, "model_type is 'gemma', expected one of: llama"),
        ("llava", {"vision_config": {"model_type": "siglip_vision_model"}}, "expected 'clip_vision_model'"),
        (
            "llava_next",
            {"image_grid_pinpoints": [[100, 168]]},
            r"holds \[100, 168\], expected multiples of the 84",
        ),
        ("llava_next", {"sliding_window": "x"}, "'sliding_window' is 'x', expected int"),
        ("llava_next", {"image_grid_pinpoints": [[3]]}, "expected pairs of a height and a width"),
        ("llava_next", {"sliding_window": 4096}, "sliding_window is 4096, expected null"),
        ("llava_next", {"mlp_bias": True}, "'mlp_bias' is ignored|mlp_bias"),
    ],
)
def test_configurations_that_are_not_computed(family: str, change: dict[str, Any], message: str) -> None:
    raw = config_of(family)
    if "sliding_window" in change or "mlp_bias" in change:
        raw["text_config"] |= change
        if "mlp_bias" in change:
            raw["text_config"]["model_type"] = "llama"
    else:
        raw |= change
    with pytest.raises(CheckpointError, match=message):
        FAMILIES[family].parse(raw)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llava", {"crop_size": {"height": 70, "width": 84}}, "crop_size: 'height' is 70, expected 84"),
        ("llava", {"do_center_crop": False}, "'do_center_crop' is False, expected True"),
        ("llava_next", {"image_grid_pinpoints": [[84, 84]]}, r"image_grid_pinpoints is .*as in config.json"),
        ("llava_next", {"size": {"shortest_edge": 70}}, "size has a shortest edge of 70, expected 84"),
    ],
)
def test_image_processors_that_do_not_fit(
    checkpoints: Path, tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(checkpoints / family, tmp_path / "checkpoint"))
    file = folder / "preprocessor_config.json"
    write_json(file, json.loads(file.read_text()) | change)
    with pytest.raises(CheckpointError, match=message):
        build(folder, tmp_path / "bundle")


def test_sizes_and_budgets_that_cannot_be(pipe: ppexport.Pipeline, checkpoints: Path) -> None:
    family = pipe.manifest.family
    with pytest.raises(RequestError, match=f"max_pixels is given, expected neither: a {family} model"):
        ppexport.load(checkpoints / f"{family}.bundle", max_pixels=4000)
    if family == "llava_next":
        with pytest.raises(
            RequestError,
            match=r"max_tokens \(--prunesid\) is 4, expected at least 5: the image is shown in 5",
        ):
            pipe.encode(picture(168, 168), ppexport.PruneSID(4))
        with pytest.raises(
            RequestError, match=r"max_tokens of PixelPrune .* is 9, expected none for an image in 5"
        ):
            pipe.encode(picture(168, 168), ppexport.PixelPrune(max_tokens=9))
    with pytest.raises(RequestError, match=r"is 1, expected at least \d+.* and the class token counts"):
        pipe.encode(picture(168, 168), ppexport.PruneSID(1, order="reference", share="each"))
    with pytest.raises(ppexport.ImageError, match="an aspect ratio of 300"):
        pipe.encode(picture(2, 600), None)
