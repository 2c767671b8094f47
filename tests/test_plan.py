"""Profiles: from images, as a file, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest
from conftest import GOLDEN, IMAGES
from PIL import Image
from terminal import runner

import ppexport
from ppexport import plan as planner
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.compile_bundle import compile_bundle
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.models import profiles, prune_place
from ppexport.models.config import ModelConfig
from ppexport.runtime.backends.cuda import rounded
from ppexport.runtime.selector import HostSelector, Selector
from ppexport.trt_build import Options


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return Checkpoint.open(GOLDEN / "e2e" / "model").config


def test_defaults_pass_their_own_check(model: ModelConfig) -> None:
    for pixels in (1024, 65536, 2097152):
        for capacity in (2, 300, 4096):
            profiles.check(profiles.defaults(model, 4096, pixels, capacity), model, 4096)
    sizes = profiles.defaults(model, 32768, 2097152, 4096)
    assert (sizes.capacity, sizes.vision[0]["K"], sizes.prefill[0]["S"][2]) == (4096, (1, 682, 2048), 4096)
    with pytest.raises(
        ppexport.RequestError, match="max_pixels is 1000, expected at least one token of 32 x 32"
    ):
        profiles.defaults(model, 4096, 1000, 64)
    with pytest.raises(ppexport.RequestError, match="capacity is 5000, expected 2 to 4096"):
        profiles.defaults(model, 4096, 65536, 5000)


def test_file_there_and_back(model: ModelConfig, tmp_path: Path) -> None:
    sizes = profiles.defaults(model, 4096, 65536, 4096)
    profiles.write(sizes, tmp_path / "p.json")
    assert profiles.read(tmp_path / "p.json") == sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 7}, "schema is 7, expected 2"),
        ({"capacity": 1}, "capacity is 1, expected 2 to 4096"),
        ({"max_pixels": 5}, "max_pixels is 5, expected 1024 to 100000000"),
        ({"vision": ()}, "vision has no profile, expected at least one"),
        (
            {"vision": ({"H": (32, 32, 32), "K": (1, 1, 1)},)},
            r"vision\[0\] has the axes \['H', 'K'\], expected \['H', ",
        ),
        (
            {"prune": ({"H": (32, 48, 64), "W": (32, 32, 32)},)},
            r"prune\[0\].H is \[32, 48, 64\], expected rising multi",
        ),
        (
            {"prefill": ({"S": (9, 5, 10), "K": (1, 1, 1)},)},
            r"prefill\[0\].S is \[9, 5, 10\], expected rising up to 131072: min, opt",
        ),
        (
            {"prefill": ({"S": (1, 5, 4097), "K": (1, 1, 1)},)},
            r"prefill\[0\].S goes to 4097, expected at most 4096",
        ),
        (
            {"prefill": ({"S": (1, 5, 9), "K": (1, 1, 4097)},)},
            r"prefill\[0\].K goes to 4097, expected at most 4096",
        ),
        (
            {"vision": ({"H": (32, 32, 64), "W": (32, 32, 96), "K": (1, 5, 7)},)},
            r"vision\[0\].K goes to 7, expected at most 6, what H and W hold",
        ),
        (
            {"prune": ({"H": (32, 32, 32 * 10**19), "W": (32, 32, 32)},)},
            r"prune\[0\].H is .*, expected rising multiples of 32 up to 131072",
        ),
    ],
)
def test_profiles_that_do_not_fit(model: ModelConfig, change: dict, message: str) -> None:
    sizes = dataclasses.replace(profiles.defaults(model, 4096, 65536, 4096), **change)
    with pytest.raises(ppexport.RequestError, match=message):
        profiles.check(sizes, model, 4096)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a profile file"),
        ('{"schema": 1}', "p.json: capacity: is missing"),
        (None, "cannot be read as a profile file.*'ppexport plan' writes one"),
    ],
)
def test_bad_files(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "p.json").write_text(text)
    with pytest.raises(ppexport.RequestError, match=message):
        profiles.read(tmp_path / "p.json")


def test_bucket_edges() -> None:
    assert planner.bucket_edges([100] * 10, 2000) == [
        128,
        2000,
    ]  # the ninth decile lies where the median does
    assert planner.bucket_edges([100] * 8 + [900] * 2, 2000) == [128, 1024, 2000]
    assert planner.bucket_edges([1900] * 10, 2000) == [2000]
    assert planner.bucket_edges([1], 1) == [1]


def test_plan_command(tmp_path: Path, model: ModelConfig) -> None:
    images = sorted(str(p) for p in IMAGES.glob("*.png"))
    result = runner().invoke(
        main, ["plan", *images, "-o", str(tmp_path / "p.json"), "--max-pixels", "600000"]
    )
    assert result.exit_code == 0, result.output
    sizes = profiles.check(profiles.read(tmp_path / "p.json"), model, 32768)
    kept = sorted(ppexport.select(image, max_pixels=600000).kept for image in images)
    assert f"{len(images)} images: kept tokens p10 {int(np.percentile(kept, 10))}, p50" in result.stdout
    assert f"max {kept[-1]}" in result.stdout
    assert result.stdout.count("bucket") == len(sizes.vision) > 1
    assert sizes.vision[0]["K"][2] >= kept[len(kept) // 2 - 1]
    assert sizes.vision[-1]["K"][2] == max(
        ppexport.select(image, max_pixels=600000).total for image in images
    )
    assert sizes.prefill[-1]["S"][2] == 4096
    served = [
        int(line.split("serves ")[1].split("%")[0]) for line in result.stdout.splitlines() if "serves" in line
    ]
    assert 99 <= sum(served) <= 101


def test_plan_errors(tmp_path: Path) -> None:
    Image.new("RGB", (640, 640)).save(tmp_path / "a.png")
    with pytest.raises(
        ppexport.RequestError, match="engines prune with pixelprune.pred_2d.max only, found pixel"
    ):
        planner.plan([str(tmp_path / "a.png")], ppexport.PixelPrune("raster"))
    command = ["plan", str(tmp_path / "a.png"), "-o", str(tmp_path / "p.json"), "--capacity", "300"]
    result = runner().invoke(main, command)
    assert result.exit_code == 1
    assert "an unpruned image of 400 tokens and 256 of text do not fit a capacity of 300" in result.output
    result = runner().invoke(main, ["plan", str(tmp_path / "none.png"), "-o", str(tmp_path / "p.json")])
    assert result.exit_code == 1
    assert not (tmp_path / "p.json").exists()


def test_plan_replaces_nothing_but_plans(tmp_path: Path) -> None:
    """Neither an image, nor a bundle's manifest, nor any other file; checked before the work."""
    picture, notes = tmp_path / "a.png", tmp_path / "notes.json"
    Image.new("RGB", (320, 320)).save(picture)
    notes.write_text("{}")
    before = picture.read_bytes()
    for target, message in (
        (picture, "is not a profile file"),
        (notes, "is not a profile file"),
        (tmp_path, "expected"),
    ):
        result = runner().invoke(main, ["plan", str(picture), "-o", str(target)])
        assert result.exit_code == 1
        assert message in result.output
    assert (picture.read_bytes(), notes.read_text()) == (before, "{}")
    for _ in range(2):  # a plan may be made again
        assert runner().invoke(main, ["plan", str(picture), "-o", str(tmp_path / "p.json")]).exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "notes.json", "p.json"]


def test_a_cuda_python_that_finds_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 12 raises RuntimeError where 13 returns an error code."""
    from ppexport import doctor
    from ppexport.runtime.backends import cuda

    def missing(*_: object) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    fake = types.SimpleNamespace(cudaGetDeviceCount=missing, cudaDeviceAttr=int)
    monkeypatch.setattr(cuda, "api", lambda: cuda.Api(fake))  # type: ignore[arg-type]
    found = doctor._gpu()
    assert found.found.startswith(
        "none that can be used: CUDA failed: Failed to dlopen libcuda.so.1; found no NVIDIA"
    )


def test_outside_names_the_axis() -> None:
    listed = [{"K": (1, 5, 10), "H": (32, 32, 64)}, {"K": (1, 5, 20), "H": (32, 32, 32)}]
    assert profiles.fitting(listed, {"K": 15, "H": 32}) == 1
    assert profiles.fitting(listed, {"K": 15, "H": 64}) is None
    assert "no profile of the engine takes K 15, H 64 together" in profiles.outside(
        listed, {"K": 15, "H": 64}, "vision"
    )
    wide = [{"S": (1, 5, 9), "K": (1, 5, 10)}]
    assert profiles.outside(wide, {"K": 21}, "language").endswith(
        "build it again with --capacity or --profiles"
    )
    assert "K (kept image tokens) is 21, the engine takes 1 to 10, 1 to 20" in profiles.outside(
        listed, {"K": 21}, "vision"
    )


REST = ", GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "R35 (release), REVISION: 4.1",
            "JetPack 5 (L4T 35.4.1): TensorRT 8.5, Python 3.8, CUDA 11.4; runs bundles on",
        ),
        ("R36 (release), REVISION: 3.0", "JetPack 6.0 (L4T 36.3.0): TensorRT 8.6"),
        ("R36 (release), REVISION: 4.0", "JetPack 6.1 (L4T 36.4.0): TensorRT 10.3"),
        (
            "R36 (release), REVISION: 4.3",
            "JetPack 6.2 (L4T 36.4.3): TensorRT 10.3, Python 3.10, CUDA 12.6; runs engines",
        ),
        ("R36 (release), REVISION: 4.7", "JetPack 6.2 (L4T 36.4.7)"),
        ("R38 (release), REVISION: 2.1", "JetPack 7.0 (L4T 38.2.1): TensorRT 10.13"),
        ("R38 (release), REVISION: 4.0", "JetPack 7.1 or later (L4T 38.4.0)"),
        ("R32 (release), REVISION: 7.1", "L4T 32.7.1, older than JetPack 5"),
        ("R34 (release), REVISION: 1.1", "JetPack 5 (L4T 34.1.1): TensorRT 8.5"),
        ("R40 (release), REVISION: 1.0", "JetPack 7.1 or later (L4T 40.1.0)"),
        ("R39", "found 'R39, GCID"),
    ],
)
def test_doctor_knows_jetpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str
) -> None:
    from ppexport import doctor

    file = tmp_path / "nv_tegra_release"
    file.write_text(f"# {line}{REST}\n")
    monkeypatch.setattr(doctor, "TEGRA_RELEASE", file)
    found = next(each for each in doctor.examine() if each.name == "Jetson")
    assert found.found.startswith(expected), found
    assert bool(found.todo) == ("8." in expected.partition("TensorRT ")[2][:2] or "older" in expected)
    if not found.todo and "L4T" in expected:
        assert "dialect plain, with cuda-python==1" in found.found


def test_doctor(tiny_bundle: Path, tmp_path: Path) -> None:
    result = runner().invoke(main, ["doctor", str(tiny_bundle)])
    assert result.exit_code == 0, result.output
    lines = {line[:22].strip(): line[22:] for line in result.stdout.splitlines()}
    assert "onnxruntime" in lines["packages"]
    assert "CPU" in lines["ONNX Runtime"]
    assert "cpu" in lines["can run on"]
    assert lines["on cpu"] == "runs"
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    (broken / "vision.onnx").write_bytes(b"")
    assert runner().invoke(main, ["doctor", str(broken)]).exit_code == 1
    assert "has no engines for tensorrt-rtx; its graphs are for ONNX Runtime only" in lines["on tensorrt-rtx"]
    assert json.dumps(lines)
    result = runner().invoke(main, ["doctor", str(tiny_bundle / "nothing")])
    assert result.exit_code == 1


def test_information_goes_into_the_file_and_out_again(pocket_bundle: Path, tmp_path: Path) -> None:
    """The mean over the images, which a dynamic budget is a share of."""
    images = [str(IMAGES / name) for name in ("web_gnuplot.png", "pdf_gnuplot-020.png")]
    file = tmp_path / "p.json"
    done = runner().invoke(
        main,
        [
            "plan",
            *images,
            "--bundle",
            str(pocket_bundle),
            "--max-pixels",
            "200000",
            "--information",
            "-o",
            str(file),
        ],
    )
    assert done.exit_code == 0, done.output
    found = profiles.read(file).information
    assert found is not None
    assert f"information {found:.4f} on average" in done.output
    with ppexport.load(pocket_bundle, reuse=0) as pipe:
        each = [pipe.information(image) for image in images]
        assert found == pytest.approx(np.mean(each), abs=1e-5)
        features = pipe.encode(images[0]).embeds.astype(np.float64)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        n = len(unit)
        assert each[0] == pytest.approx(1 - ((unit @ unit.T).sum() - n) / (n * (n - 1)), abs=1e-4)
        prune = [ppexport.PixelPrune(), ppexport.PruneSID(40, dynamic=True, information=found)]
        kept = [len(pipe.encode(image, prune).keep) for image in images]
    assert [round(40 * one / found) for one in each] == kept
    run = runner().invoke(
        main,
        [
            "run",
            str(pocket_bundle),
            "What?",
            "-i",
            images[0],
            "-n",
            "1",
            "--prunesid",
            "40",
            "--dynamic",
            str(file),
            "--json",
        ],
    )
    assert json.loads(run.stdout)["kept"] == kept[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dynamic", "0.5"], "--dynamic goes with --prunesid N"),
        (["--prunesid", "9", "--dynamic", "none.json"], "none.json: cannot be read as a profile file"),
        (["--prunesid", "9", "--dynamic", "-1"], "information is -1.0, expected a number over 0"),
    ],
)
def test_dynamic_budgets_that_cannot_be(pocket_bundle: Path, arguments: list[str], message: str) -> None:
    done = runner().invoke(main, ["run", str(pocket_bundle), "What?", *arguments])
    assert done.exit_code != 0
    assert message in done.stderr


def test_a_file_without_information(pocket_bundle: Path, tmp_path: Path, model: ModelConfig) -> None:
    profiles.write(profiles.defaults(model, 4096, 65536, 4096), tmp_path / "p.json")
    arguments = ["--prunesid", "9", "--dynamic", str(tmp_path / "p.json")]
    done = runner().invoke(main, ["run", str(pocket_bundle), "What?", *arguments])
    assert "holds no information of images; write it with: ppexport plan" in done.stderr
    alone = runner().invoke(
        main, ["plan", str(IMAGES / "web_gnuplot.png"), "--information", "-o", str(tmp_path / "q")]
    )
    assert "--information looks at a bundle: --bundle names it" in alone.stderr


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, emulator.Cuda]]:
    """The pocket model with engines for the emulated GPU."""
    with emulator.installed("tensorrt") as gpu:
        path = tmp_path_factory.mktemp("engines") / "bundle"
        pocket = GOLDEN.parent.parent / "models" / "pocket"
        yield build(pocket, path, "fp16", "plain", ["tensorrt"], options=Options(capacity=512)), gpu


def test_memory_of_engines(engines: tuple[Path, emulator.Cuda], pocket_bundle: Path, tmp_path: Path) -> None:
    """Of the sizes that build takes, of given ones, and of a profile file."""
    bundle, _ = engines
    command = ["plan", "--memory", "--bundle", str(bundle)]
    result = runner().invoke(main, command)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(
        "qwen3_vl, weights in fp16; one sequence of 2048 tokens, images of up to 307200 p"
    )
    sizes = {line.split("  ")[0]: line for line in lines[1:]}
    states = rounded(2 * 6 * 2 * 48 * 2048 * 2)  # keys and values, layers, heads, width, tokens, bytes
    assert sizes["states"].split()[1] == f"{states / 1e6:.0f}"
    assert "assumed" in sizes["CUDA context"]
    assert lines[-3:] == [
        "to run, beside a system of 1.6 GB: a board of 8 GB",
        "to run and keep, beside a system of 1.6 GB: a board of 8 GB",
        "to build, beside a system of 1.6 GB: a board of 8 GB",
    ]
    assert "one sequence of 99 tokens" in runner().invoke(main, [*command, "--capacity", "99"]).output
    file = tmp_path / "p.json"
    made = runner().invoke(
        main, ["plan", str(IMAGES / "web_gnuplot.png"), "-o", str(file), "--capacity", "1100"]
    )
    assert made.exit_code == 0, made.output
    assert "one sequence of 1100 tokens" in runner().invoke(main, [*command, "--profiles", str(file)]).output
    result = runner().invoke(main, ["plan", "--memory", "--bundle", str(pocket_bundle)])
    assert result.exit_code != 0
    assert (
        "has graphs of dialect ort, expected standard or plain: memory is planned for engines"
        in result.output
    )


def test_where_pixels_are_pruned(
    engines: tuple[Path, emulator.Cuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was measured to be faster, on that GPU; kept by the bundle, and said."""
    bundle, _ = engines
    image = IMAGES / "web_gnuplot.png"
    with ppexport.load(bundle, "tensorrt") as pipe:
        assert isinstance(pipe.selector, Selector)
        expected = pipe.encode(image)
    slower = "_run"
    for place, slow in (("host", Selector), ("device", HostSelector)):
        name = slower if slow is Selector else "looks"
        whole = getattr(slow, name)

        def late(self: Any, *given: Any, whole: Any = whole) -> Any:
            if getattr(self.backend, "gpu", ""):
                time.sleep(0.05)
            return whole(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(slow, name, late)
            result = runner().invoke(
                main, ["plan", str(image), "--bundle", str(bundle), "--measure", "tensorrt"]
            )
        assert result.exit_code == 0, result.output
        assert re.search(r"1 images on Emulated: pixels are pruned on the device in [\d.]+ ms", result.output)
        assert f"prunes on the {place} with --device tensorrt from now on" in result.output
        with ppexport.load(bundle, "tensorrt") as pipe:
            assert isinstance(pipe.selector, HostSelector if place == "host" else Selector)
            assert ("pixels are pruned on the host" in pipe.chosen) == (place == "host")
            found = pipe.encode(image)
            np.testing.assert_array_equal(found.keep, expected.keep)
            np.testing.assert_array_equal(found.features, expected.features)
            if place == "host":  # with any method
                assert pipe.encode(image, ppexport.PixelPrune("raster")).selection.kept
    assert len(prune_place.read(bundle).measured) == 1
    assert prune_place.place(bundle, "tensorrt", "another GPU") == "device"


def test_what_cannot_be_measured(
    engines: tuple[Path, emulator.Cuda], pocket_bundle: Path, tmp_path: Path
) -> None:
    image = str(IMAGES / "web_gnuplot.png")
    for given, message in (
        ([image], "expected -o for a profile file, --memory or --measure"),
        ([image, "--measure", "tensorrt"], "--measure looks at a bundle: --bundle names it"),
        (
            ["--measure", "tensorrt", "--bundle", str(pocket_bundle)],
            "--measure looks at images, expected some",
        ),
        (["--memory"], "--memory looks at a bundle"),
        (
            [image, "-o", str(tmp_path / "p"), "--profiles", "x"],
            "--profiles goes with --memory, and without -o",
        ),
        ([image, "--memory", "--bundle", str(pocket_bundle)], "--memory looks at no images"),
        (
            ["--memory", "--information", "--bundle", str(pocket_bundle)],
            "--information goes into a profile file",
        ),
        ([image, "--measure", "tensorrt", "--bundle", str(pocket_bundle)], "has no engines for tensorrt"),
    ):
        result = runner().invoke(main, ["plan", *given])
        assert result.exit_code != 0
        assert message in result.output, result.output
    with pytest.raises(
        ppexport.RequestError, match="device is 'cpu', expected cuda, tensorrt or tensorrt-rtx"
    ):
        planner.measure(pocket_bundle, "cpu", [image])
    bundle, _ = engines
    file = bundle / prune_place.FILE
    ppexport.load(bundle, "cpu").close()
    times = {
        "device": "tensorrt",
        "gpu": "Emulated",
        "images": 1,
        "on_device_ms": float("nan"),
        "on_host_ms": 1.0,
    }
    for text, message in (
        ("{}", "is damaged .*; remove it"),
        (json.dumps({"schema": 9, "measured": []}), "found schema 9, expected 1; remove it"),
        (json.dumps({"schema": 1, "measured": [times]}), "holds times that are none|is damaged"),
    ):
        file.write_text(text)
        ppexport.load(bundle, "cpu").close()  # does not look at it
        with pytest.raises(ppexport.BundleError, match=message):
            ppexport.load(bundle, "tensorrt")
    file.unlink()


def test_without_onnxruntime_the_device_prunes(
    engines: tuple[Path, emulator.Cuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was measured; it is told. New engines have not been measured."""
    bundle, _ = engines
    prune_place.keep(bundle, prune_place.Measured("tensorrt", "Emulated", 1, 9.0, 1.0))

    def missing(*_: object) -> None:
        raise ppexport.BackendError("onnxruntime is not installed")

    with monkeypatch.context() as patch:
        patch.setattr(HostSelector, "__init__", missing)
        with ppexport.load(bundle, "tensorrt") as pipe:
            assert isinstance(pipe.selector, Selector)
            assert "though the host was measured to be faster: onnxruntime is not" in pipe.backend.notes[0]
    compile_bundle(bundle, "tensorrt", None, Options(capacity=512))
    assert prune_place.read(bundle).measured == ()


def test_a_plan_fits_its_bundle(engines: tuple[Path, emulator.Cuda], tmp_path: Path) -> None:
    """Its context, and the sizes that its dialect is compiled for by itself."""
    file = tmp_path / "p.json"
    arguments = [
        "plan",
        str(IMAGES / "web_gnuplot.png"),
        "-o",
        str(file),
        "--bundle",
        str(engines[0]),
        "--memory",
    ]
    result = runner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert profiles.read(file).capacity == 2048
