"""``ppexport inspect``: numbers, pictures, sweeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import IMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prune_cases import images
from prune_spec import anchors_of
from test_cli import invoke

import ppexport
from ppexport.inspect import LEVELS
from ppexport.models.pruners.pixelprune import PREDICTORS, PRUNE_METHODS
from ppexport.overlay import ABOVE, BESIDE, EDGE, KEPT, OTHERWISE, TINTS, overlay, sources
from ppexport.runtime.selector import select_frames

SCREEN = IMAGES / "web_gnuplot.png"
DESKTOP = IMAGES / "gui_mousepad.png"


def test_inspect_prints_numbers_and_writes_the_overlay(tmp_path: Path) -> None:
    code, out, _ = invoke("inspect", SCREEN, "--overlay", tmp_path / "o.png")
    assert code == 0
    assert "24 x 32 = 768 tokens" in out
    assert "198 (25.8%)" in out
    picture = np.asarray(Image.open(tmp_path / "o.png"))
    original = np.asarray(Image.open(SCREEN).convert("RGB"))
    assert picture.shape[1] == 1024
    assert picture.shape[0] > 768  # the legend
    selection = ppexport.select(SCREEN)
    dropped = np.setdiff1d(np.arange(768), selection.keep)
    for token in (*selection.keep[:40], *dropped[:40]):
        row, col = divmod(int(token), 32)
        inside = np.s_[row * 32 + 4 : row * 32 + 28, col * 32 + 4 : col * 32 + 28]
        same = (picture[:768][inside] == original[inside]).all()
        assert same == (token in selection.keep)


def test_inspect_json(tmp_path: Path) -> None:
    code, out, _ = invoke("inspect", SCREEN, "--json", "--tau", "0.05")
    assert code == 0
    (found,) = json.loads(out)
    assert found["keep"] == ppexport.select(SCREEN, ppexport.PixelPrune(tau=0.05)).keep.tolist()
    assert found["prune"] == {
        "method": "pred_2d",
        "metric": "max",
        "tau": 0.05,
        "mode": "anchored",
        "max_tokens": None,
        "seed": 0,
    }
    assert found["grid"] == {"rows": 24, "cols": 32}
    assert found["kept"] == len(found["keep"]) == 198


def test_inspect_takes_every_method(tmp_path: Path) -> None:
    kept = {}
    for method in PRUNE_METHODS[:3] + PRUNE_METHODS[4:]:
        code, out, _ = invoke(
            "inspect", SCREEN, "--tau", 0.02, "--method", method, "--metric", "mae", "--json"
        )
        assert code == 0
        (found,) = json.loads(out)
        assert found["prune"] == {
            "method": method,
            "metric": "mae",
            "tau": 0.02,
            "mode": "anchored",
            "max_tokens": None,
            "seed": 0,
        }
        kept[method] = found["kept"]
    assert kept["random"] == kept["pred_2d"] < 198
    assert len(set(kept.values())) > 1


@settings(max_examples=40, deadline=None)
@given(
    image=images(),
    level=st.sampled_from([0, 1, 3, 20]),
    method=st.sampled_from(PREDICTORS),
    anchored=st.booleans(),
)
def test_every_dropped_token_is_shown_as_what_it_was_predicted_from(
    image: np.ndarray, level: int, method: str, anchored: bool
) -> None:
    """The tints tell the specification's predictions: 28 pixels a token here, made of 4."""
    large = np.kron(image, np.ones((7, 7, 1), np.uint8))
    prune = ppexport.PixelPrune(method, "max", level / 255, anchored)
    selection = ppexport.select(large, prune, patch=14, min_pixels=1)
    rows, cols = selection.rows, selection.cols
    found = sources(large, selection).reshape(-1)
    kept, anchors = anchors_of(large, 28, method, "max", level, anchored)
    assert set(np.flatnonzero(found == KEPT)) == kept
    for index in set(range(rows * cols)) - kept:
        row, col = divmod(index, cols)
        backwards = method == "serpentine" and row % 2
        beside = index + 1 if backwards else index - 1
        before = {BESIDE: beside, ABOVE: index - cols, OTHERWISE: index - 1}[found[index]]
        if anchored:
            assert anchors[before] == anchors[index]
        if found[index] == BESIDE:
            assert before // cols == row
        if found[index] == OTHERWISE:
            assert (method, col) == ("raster", 0)


def test_both_directions_are_in_a_real_picture() -> None:
    found = sources(
        np.asarray(Image.open(DESKTOP).convert("RGB").resize((1920, 1088))), ppexport.select(DESKTOP)
    )
    assert {kind: int((found == kind).sum()) for kind in (KEPT, BESIDE, ABOVE)} == {
        KEPT: 297,
        BESIDE: 1680,
        ABOVE: 63,
    }


def test_what_stands_still_is_neither_from_the_left_nor_from_above() -> None:
    page = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    changed = page.copy()
    changed[:32, :64] = 7
    _, second = select_frames([page, changed], min_pixels=1)
    assert sources(changed, second).tolist() == [[KEPT, BESIDE, OTHERWISE], [OTHERWISE] * 3, [OTHERWISE] * 3]


def test_the_legend_names_what_is_in_the_picture(screen: np.ndarray) -> None:
    """Each colour stands in the legend if and only if it is in the picture, also where the legend takes more lines."""
    for method, expected in (("pred_2d", {BESIDE, ABOVE}), ("random", {OTHERWISE})):
        selection = ppexport.select(screen, ppexport.PixelPrune(method), min_pixels=1)
        legend = np.asarray(overlay(screen, selection))[128:]
        assert legend.shape[0] >= 4 * 14
        colours = {tuple(c) for c in legend.reshape(-1, 3)}  # swatches have an outline in the pure colour
        assert {kind for kind, tint in TINTS.items() if tint in colours} == expected
        assert EDGE in colours


def test_several_images_get_a_line_each_and_one_for_all(tmp_path: Path) -> None:
    code, out, _ = invoke("inspect", SCREEN, DESKTOP, "--overlay", tmp_path / "seen")
    assert code == 0
    assert f"image   {SCREEN}: 1024 x 768" in out
    assert "all     2 images: kept 495 of 2808 (17.6%), median 20.2%" in out
    assert sorted(p.name for p in (tmp_path / "seen").iterdir()) == [
        "001-web_gnuplot.png",
        "002-gui_mousepad.png",
    ]
    code, out, _ = invoke("inspect", SCREEN, DESKTOP, "--json")
    assert [(r["image"], r["kept"]) for r in json.loads(out)] == [(str(SCREEN), 198), (str(DESKTOP), 297)]


def test_frames_of_a_recording(tmp_path: Path) -> None:
    code, out, _ = invoke("inspect", SCREEN, SCREEN, "--frames", "--json")
    assert code == 0
    assert [r["kept"] for r in json.loads(out)] == [198, 0]
    code, _, err = invoke("inspect", SCREEN, DESKTOP, "--frames")
    assert code == 1
    assert "frame 2 has 1920 x 1088 pixels after resizing, expected 1024 x 768" in err


def test_budget() -> None:
    code, out, _ = invoke("inspect", SCREEN, "--max-tokens", 190)
    assert code == 0
    assert (
        "kept    190 (24.7%), tau 0.25 would keep 198 tokens, expected at most 190; kept are the 190 that"
        in out
    )
    code, out, _ = invoke("inspect", SCREEN, "--max-tokens", 198)
    assert "kept    198 (25.8%), tau 0\n" in out
    code, _, err = invoke("inspect", SCREEN, "--max-tokens", 5, "--method", "unique")
    assert code == 1
    assert "max_tokens goes with pred_2d, raster, serpentine, found method 'unique'" in err


def test_sweep_is_a_table_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = invoke("inspect", SCREEN, "--sweep", tmp_path / "s.png")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["tau", "pred_2d", "raster", "serpentine", "unique"]
    assert rows[1][:2] == ["0/255", "25.8%"]
    assert [row[0] for row in rows[1:-1]] == [f"{level}/255" for level in LEVELS]
    assert rows[-1] == ["plot", str(tmp_path / "s.png")]
    assert min(Image.open(tmp_path / "s.png").size) > 500
    _, out, _ = invoke("inspect", SCREEN, "--sweep", tmp_path / "s.png", "--json", "--metric", "mae")
    shares = json.loads(out)
    assert shares["pred_2d"][0] == [0, pytest.approx(198 / 768)]
    assert shares["unique"] == [
        [0, pytest.approx(ppexport.select(SCREEN, ppexport.PixelPrune("unique")).share)]
    ]
    for method in PREDICTORS:
        kept = [share for _, share in shares[method]]
        assert kept[-1] < kept[0]


def test_narrow_pictures_have_a_whole_legend() -> None:
    tall = np.tile(np.arange(4000, dtype=np.uint8)[:, None, None] // 40, (1, 20, 3))
    selection = ppexport.select(tall, min_pixels=1)
    assert selection.width == 32
    assert overlay(tall, selection).width > 200


def test_inputs_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    first, second = tmp_path / "a.png", tmp_path / "out" / "001-a.png"
    for path in (first, second):
        path.write_bytes(SCREEN.read_bytes())
    for options in ([first, second, "--overlay", tmp_path / "out"], [first, "--sweep", first]):
        code, out, err = invoke("inspect", *options)
        assert (code, out) == (1, "")
        assert "is a file that is read" in err
    assert first.read_bytes() == second.read_bytes() == SCREEN.read_bytes()


def test_long_names(tmp_path: Path) -> None:
    images = [tmp_path / f"{letter * 245}.png" for letter in "ab"]
    for image in images:
        image.write_bytes(SCREEN.read_bytes())
    assert invoke("inspect", *images, "--overlay", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_impossible_requests(tmp_path: Path) -> None:
    for options in (["--frames"], ["--tau", "0.1"], ["--method", "raster"], ["--max-tokens", "9"]):
        code, _, err = invoke("inspect", SCREEN, "--sweep", tmp_path / "s.png", *options)
        assert code == 2
        assert f"--sweep goes with --metric and --mode only, found {options[0]}" in err
    assert invoke("inspect", SCREEN, "--prune-seed", 3)[0] == 2
    for options, message in (
        (["--sweep", tmp_path / "s.bmp"], "expected a name that ends in .png, .svg or .pdf"),
        (["--sweep", ""], "expected a name that ends in .png, .svg or .pdf"),
        (["--overlay", tmp_path / "o.psd"], "expected a name that ends in .png or .jpg"),
        (
            [SCREEN, "--frames", "--max-tokens", 9],
            "predicted by pred_2d with a fixed tau, found max_tokens 9",
        ),
        (
            [SCREEN, "--overlay", tmp_path / "one.png"],
            "is a file, expected a folder for the overlays of 2 images",
        ),
        ([SCREEN, "--overlay", tmp_path / "no" / "such"], "expected a folder in an existing one"),
    ):
        code, out, err = invoke("inspect", SCREEN, *options)
        assert (code, out) == (1, "")
        assert message in err
    assert list(tmp_path.iterdir()) == []
