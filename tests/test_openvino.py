"""OpenVINO as a backend: the tower and whole bundles on it, and which one "auto" takes for the tower."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import E2E_PIXELS, GOLDEN, WITHOUT_VNNI, cosines, usual_and_slow
from PIL import Image
from terminal import runner

import ppexport
from ppexport import doctor
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.models.families import FAMILIES
from ppexport.models.precision import Wanted
from ppexport.runtime import vision_place
from ppexport.runtime.backends import devices, openvino, processor
from ppexport.runtime.backends.openvino import CACHE, OpenVino
from ppexport.runtime.bundle import open_bundle
from ppexport.verify import verify

pytest.importorskip("openvino", reason="the extra openvino is not installed")

SCREEN = GOLDEN.parent.parent / "docs" / "settings.png"
WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 1984, 3), np.uint8))
TOWER = "vision=openvino"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """ "auto" may take OpenVINO; returns the folder that keeps what was measured."""
    monkeypatch.setattr(devices, "has_openvino", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ppexport"


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that no other test has loaded."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns(CACHE)))


@pytest.fixture(scope="module")
def bfloat16_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_checkpoint, tmp_path_factory.mktemp("narrow") / "bundle", "bf16")


def test_the_second_tower_holds_no_weights(tiny_bundle: Path) -> None:
    """Its file refers to the weights of the first one."""
    manifest = open_bundle(tiny_bundle)[1]
    assert manifest.graphs["vision"].also == {"openvino": "vision.openvino.onnx"}
    assert manifest.graphs["language"].also == {}
    assert "vision.openvino.onnx.data" not in manifest.files
    graph = onnx.load(tiny_bundle / "vision.openvino.onnx", load_external_data=False).graph
    data = {entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"}
    assert data == {"vision.onnx.data"}
    assert {node.domain for node in graph.node} == {""}
    assert max(len(t.raw_data) for t in graph.initializer) < 16384


@pytest.mark.parametrize(
    ("family", "precision"),
    usual_and_slow(
        [
            ("qwen3_vl", "fp32"),
            ("qwen3_vl", "int8"),
            ("qwen2_5_vl", "bf16"),
            ("llava_next", "fp32"),
            ("llava", "int8"),
        ],
        [(f, p) for f in sorted(set(FAMILIES) - {"qwen3_5_text"}) for p in ("fp32", "bf16", "int8", "int4")],
    ),
)
def test_every_family(family: str, precision: str, tmp_path: Path) -> None:
    """Features as the modules in torch have them; of integers, those that ONNX Runtime has of the same integers."""
    checkpoint = tmp_path / "checkpoint"
    write_random(random_config(family, "tiny"), checkpoint)
    write_text_files(checkpoint, family)
    vision = "int8" if precision == "int8" else None
    bundle = build(checkpoint, tmp_path / "bundle", Wanted(precision, vision=vision))
    if precision == "fp32":
        report = verify(bundle, checkpoint, [str(SCREEN)], device=TOWER, tokens=8)
        assert report.agreement == 1.0
        assert report.embeds is not None
        assert report.embeds.error < 1e-4
        return
    _, manifest = open_bundle(bundle)
    with ppexport.load(bundle, TOWER) as pipe:
        found = pipe.encode(SCREEN).embeds
        assert pipe.chosen == "vision on openvino-cpu, language on onnxruntime-cpu, as asked for"
    if manifest.precision.vision == "w8a8" and WITHOUT_VNNI:
        return
    with ppexport.load(bundle, "cpu") as pipe:
        expected = pipe.encode(SCREEN).embeds
    assert cosines(found, expected).min() > 0.99


@pytest.mark.parametrize("vision", ["w8a8", "int4"])
def test_integers_are_those_of_the_first_graph(
    golden_pipe: ppexport.Pipeline, vision: str, tmp_path: Path
) -> None:
    """A tower that ONNX Runtime does not run without VNNI runs here, and is as close to float32 as its weights are."""
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", Wanted("int8", vision=vision))
    pipe = ppexport.load(bundle, TOWER, max_pixels=E2E_PIXELS)
    least = cosines(pipe.encode(SCREEN).embeds, golden_pipe.encode(SCREEN).embeds).min()
    assert least > {"w8a8": 0.999, "int4": 0.95}[vision]


@pytest.mark.parametrize("device", [TOWER, "openvino"])
def test_answers_are_those_of_onnxruntime(
    tiny_bundle: Path, tiny_checkpoint: Path, device: str, tmp_path: Path
) -> None:
    """Pruned and whole: the tower alone, and with the decoder of a plain bundle."""
    bundle = tiny_bundle
    if device == "openvino":
        bundle = build(tiny_checkpoint, tmp_path / "bundle", "fp32", dialect="plain")
    ran = runner().invoke(
        main, ["verify", str(bundle), "--against-cpu", "--device", device, "-i", str(SCREEN)]
    )
    assert ran.exit_code == 0, ran.output
    with ppexport.load(bundle, device) as pipe, ppexport.load(bundle, "cpu") as cpu:
        for prune in ("default", None):
            for question in ("What?", "What else?"):  # the second one behind what the first one left
                mine, theirs = (p.generate(question, SCREEN, prune, 12).text() for p in (pipe, cpu))
                assert mine == theirs


def test_the_pocket_model_answers_the_same(pocket_bundle: Path) -> None:
    with ppexport.load(pocket_bundle, TOWER) as pipe, ppexport.load(pocket_bundle, "cpu") as cpu:
        for question in ("What is the Region?", "What is the Brightness?"):
            answer = cpu.generate(question, SCREEN).text()
            assert len(answer) > 1
            assert pipe.generate(question, SCREEN).text() == answer


def test_what_is_measured_decides_and_is_kept(
    own_bundle: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ppexport.load(own_bundle)
    (file,) = installed.iterdir()
    found = json.loads(file.read_text())
    assert set(found["milliseconds"]) == {"cpu", "openvino"}
    assert all(took > 0 for took in found["milliseconds"].values())
    assert found["refused"] == ""

    def never(*_: object) -> float:
        raise AssertionError("it was measured already")

    monkeypatch.setattr(vision_place, "_milliseconds", never)
    for mine, theirs, on in ((50.0, 100.0, "openvino-cpu"), (99.0, 100.0, ""), (100.0, 50.0, "")):
        found["milliseconds"] = {"openvino": mine, "cpu": theirs}
        file.write_text(json.dumps(found))
        shutil.rmtree(own_bundle / CACHE, ignore_errors=True)
        pipe = ppexport.load(own_bundle)
        expected = f"; vision on {on}, which was measured to be faster" if on else "; vision there, too"
        expected += f": OpenVINO {mine:.3g} ms, ONNX Runtime {theirs:.3g} ms"
        assert pipe.chosen == f"onnxruntime-cpu: the bundle has no engines{expected}"
        assert pipe.stages.vision is not None
        assert (type(pipe.stages.vision.backend) is OpenVino) == bool(on) == (own_bundle / CACHE).exists()
        assert ppexport.load(own_bundle, "cpu").chosen == "onnxruntime-cpu, as asked for"


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\xff\xfe", b'{"schema": 2}', b'{"schema":1,"cpu":"","milliseconds":{},"refused":""}'],
)
def test_a_damaged_file_is_measured_anew(own_bundle: Path, installed: Path, damage: bytes) -> None:
    ppexport.load(own_bundle)
    (file,) = installed.iterdir()
    file.write_bytes(damage)
    ppexport.load(own_bundle)
    assert len(json.loads(file.read_text())["milliseconds"]) == 2


def test_another_machine_or_tower_is_measured_anew(
    own_bundle: Path, installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ppexport.load(own_bundle)
    ppexport.load(own_bundle, threads=1)
    listed = tmp_path / "cpuinfo"
    listed.write_text("model name\t: Another CPU\nflags\t\t: avx2 avx512_vnni\n")
    monkeypatch.setattr(processor, "CPUINFO", listed)
    ppexport.load(own_bundle)
    assert len(list(installed.iterdir())) == 3


def test_nothing_can_be_kept(own_bundle: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a bundle that cannot be written: measured every time, compiled every time."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    monkeypatch.setattr("ppexport.runtime.backends.openvino._can_be_made", lambda folder: False)
    assert ppexport.load(own_bundle).generate("What?", SCREEN, max_new_tokens=2).text() is not None
    assert ppexport.load(own_bundle, TOWER).generate("What?", SCREEN, max_new_tokens=2).text() is not None
    assert not (own_bundle / CACHE).exists()


def test_compiled_graphs_are_kept_in_the_bundle(own_bundle: Path) -> None:
    """And made again where they are damaged."""
    first = ppexport.load(own_bundle, TOWER).encode(SCREEN).embeds
    (folder,) = (own_bundle / CACHE).iterdir()
    kept = [path for path in folder.iterdir() if path.is_file()]
    assert kept
    backend = OpenVino(cache=folder)
    session = backend.session(own_bundle / "vision.openvino.onnx")
    assert session.model.get_property("LOADED_FROM_CACHE")
    assert np.array_equal(ppexport.load(own_bundle, TOWER).encode(SCREEN).embeds, first)
    for path in kept:
        whole = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(whole[:100])
        assert np.array_equal(ppexport.load(own_bundle, TOWER).encode(SCREEN).embeds, first)
        path.write_bytes(bytes(len(whole)))
        assert np.array_equal(ppexport.load(own_bundle, TOWER, verify=True).encode(SCREEN).embeds, first)
        assert path.read_bytes() == bytes(len(whole))  # neither read nor written


def test_other_weights_of_the_same_age_are_compiled_anew(tmp_path: Path) -> None:
    """OpenVINO knows a graph by its path, size and time."""
    bundle = tmp_path / "bundle"
    for seed in (1, 2):
        checkpoint = tmp_path / str(seed)
        write_random(random_config("qwen3_vl", "tiny"), checkpoint, seed=seed)
        write_text_files(checkpoint)
        built = build(checkpoint, tmp_path / f"built{seed}")
        shutil.copytree(built, bundle, dirs_exist_ok=True)
        for path in bundle.iterdir():
            os.utime(path, (0, 0))
        there = ppexport.load(bundle, TOWER).encode(SCREEN).embeds
    assert np.array_equal(there, ppexport.load(built, TOWER).encode(SCREEN).embeds)


@pytest.fixture
def old_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies neither bfloat16 nor, adding up exactly, 8 bits."""
    listed = tmp_path / "cpuinfo"
    listed.write_text("model name\t: Old\nflags\t\t: avx2\n")
    monkeypatch.setattr(processor, "CPUINFO", listed)


@pytest.mark.usefixtures("old_cpu")
def test_a_cpu_without_vnni_runs_w8a8_towers(
    golden_pipe: ppexport.Pipeline, installed: Path, tmp_path: Path
) -> None:
    """On OpenVINO, which calculates them in floats; a decoder in w8a8 is refused as before."""
    model = GOLDEN / "e2e" / "model"
    bundle = build(model, tmp_path / "bundle", "int8")
    pipe = ppexport.load(bundle, max_pixels=E2E_PIXELS)
    assert pipe.chosen.endswith("; vision on openvino-cpu: this CPU has no VNNI for ONNX Runtime's")
    assert not installed.exists()
    assert cosines(pipe.encode(SCREEN).embeds, golden_pipe.encode(SCREEN).embeds).min() > 0.999
    assert ("FullyConnected", "u8") not in executed(pipe)
    with pytest.raises(
        ppexport.BackendError, match=r"--vision-precision int8, or let OpenVINO run it: --dev"
    ):
        ppexport.load(bundle, "cpu")
    bundle = build(model, tmp_path / "other", "w8a8")
    with pytest.raises(ppexport.BackendError, match=r"found a CPU without VNNI"):
        ppexport.load(bundle)


@pytest.mark.usefixtures("old_cpu")
def test_a_cpu_without_bfloat16_calculates_in_float32(bfloat16_bundle: Path) -> None:
    """OpenVINO would imitate products in bfloat16."""
    with ppexport.load(bfloat16_bundle, TOWER) as pipe, ppexport.load(bfloat16_bundle, "cpu") as cpu:
        kinds = executed(pipe)
        assert {precision for kind, precision in kinds if kind in ("FullyConnected", "Subgraph")} == {"f32"}
        assert np.allclose(pipe.encode(WIDE).embeds, cpu.encode(WIDE).embeds, atol=1e-4)


def test_positions_are_not_rounded(bfloat16_bundle: Path) -> None:
    """A tower in bfloat16 still knows where every patch of a wide picture is: angles of 100 radians."""
    with ppexport.load(bfloat16_bundle, TOWER) as pipe, ppexport.load(bfloat16_bundle, "cpu") as cpu:
        found = cosines(pipe.encode(WIDE, None).embeds, cpu.encode(WIDE, None).embeds)
    assert len(found) > 100
    assert found.min() > 0.9998


@pytest.mark.skipif(not processor.multiplies_bfloat16(), reason="a CPU without products of bfloat16")
def test_a_cpu_with_bfloat16_uses_it(bfloat16_bundle: Path) -> None:
    with ppexport.load(bfloat16_bundle, TOWER) as pipe:
        kinds = executed(pipe)
        depth = pipe.manifest.model.vision.depth
    assert kinds.count(("Subgraph", "bf16")) == depth
    assert kinds.count(("RoPE", "bf16")) == 2 * depth
    assert kinds.count(("FullyConnected", "bf16")) > 4 * depth


def test_what_is_executed(golden_pipe: ppexport.Pipeline, tmp_path: Path) -> None:
    """One kernel for the attention of a layer and for each of its rotations, and products of integers for w8a8."""
    depth = golden_pipe.manifest.model.vision.depth
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", "int8")
    kinds = executed(ppexport.load(bundle, TOWER, max_pixels=E2E_PIXELS))
    assert [kind for kind, _ in kinds].count("RoPE") == 2 * depth
    assert {"Softmax", "MatMul"}.isdisjoint(kind for kind, _ in kinds)  # those of attention
    if not WITHOUT_VNNI:
        assert kinds.count(("FullyConnected", "u8")) >= 4 * depth


def executed(pipe: ppexport.Pipeline) -> list[tuple[str, str]]:
    """What OpenVINO made of a tower's graph: kinds of operations and what they calculate in."""
    model = pipe.vision.session.model.get_runtime_model()
    return [
        (node.rt_info["layerType"].astype(str), node.rt_info["runtimePrecision"].astype(str))
        for node in model.get_ordered_ops()
    ]


def test_memory_is_shared(tiny_bundle: Path) -> None:
    """Outputs are written where the caller allocated them, inputs may be read-only."""
    backend = OpenVino()
    session = backend.session(tiny_bundle / "vision.openvino.onnx")
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    picture.flags.writeable = False
    features = backend.zeros((1 + open_bundle(tiny_bundle)[1].model.levels, 6, 32), "float32")
    binding = session.binding()
    binding.input("image", backend.upload(picture))
    binding.input("keep", backend.upload(np.arange(6, dtype=np.int32)))
    with pytest.raises(ppexport.BackendError, match="OpenVINO does not take keep"):
        binding.input("keep", backend.upload(np.zeros(6, np.float32)))
    width = open_bundle(tiny_bundle)[1].model.text.width
    features = backend.zeros((features.shape[0], 6, width), "float32")
    binding.output("features", features)
    binding.run()
    first = features.owner.copy()
    assert first.any()
    features.owner[...] = 0
    binding.run()
    assert np.array_equal(features.owner, first)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            "openvino",
            r"language graph in fp32 and dialect ort, .* run the tower alone there with --device vision=openvino",
        ),
        ("language=openvino", "expected 'plain' in fp32 or fp16 for OpenVINO"),
        (
            "vision=openvino:GPU",
            r"OpenVINO .* cannot load .* on GPU: .*devices here: CPU; install the driver of Intel's GPU",
        ),
        ("vision=cuda", "device is 'vision=cuda', expected one of: auto, cpu"),
        ("vision=openvino,vision=cpu", "each stage once; found 'vision=cpu'"),
        ("tower=openvino", "expected one of.* found 'tower=openvino'"),
        ("openvino:TPU", "expected one of"),
        ("vision=", "expected one of"),
        (3, "device is 3, expected one of"),
    ],
)
def test_devices_that_cannot_be(tiny_bundle: Path, device: str, message: str) -> None:
    if "GPU" in str(device) and "GPU" in openvino.import_openvino().Core().available_devices:
        pytest.skip("there is a GPU of Intel")
    with pytest.raises(ppexport.PpexportError, match=message):
        ppexport.load(tiny_bundle, device)
    ran = runner().invoke(main, ["run", str(tiny_bundle), "hi", "--device", str(device)])
    assert ran.exit_code in (1, 2)
    assert "Traceback" not in ran.output


def test_a_tower_that_openvino_refuses(
    own_bundle: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" goes on without it, says so, and remembers it."""

    def refuses(backend: OpenVino, path: Path) -> None:
        raise ppexport.BackendError("OpenVINO 2026 cannot load it")

    monkeypatch.setattr(OpenVino, "session", refuses)
    for _ in range(2):
        pipe = ppexport.load(own_bundle)
        assert pipe.chosen.endswith("; vision not on OpenVINO: OpenVINO 2026 cannot load it")
        assert pipe.generate("What?", SCREEN, max_new_tokens=2).text() is not None
        monkeypatch.setattr(vision_place, "_milliseconds", None)
    assert len(list(installed.iterdir())) == 1


def test_a_broken_openvino(own_bundle: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, but it cannot be imported: told, and not remembered."""

    def broken() -> None:
        raise ppexport.BackendError("openvino cannot be imported (libtbb.so.12)")

    monkeypatch.setattr(openvino, "import_openvino", broken)
    monkeypatch.setattr(doctor, "import_openvino", broken)
    chosen = ppexport.load(own_bundle).chosen
    assert chosen.endswith("; vision not on OpenVINO: openvino cannot be imported (libtbb.so.12)")
    assert not installed.exists()
    ran = runner().invoke(main, ["doctor", str(own_bundle)])
    assert ran.exit_code == 0, ran.output
    assert "which does not work: openvino cannot be imported" in ran.output


def test_models_of_text_alone(installed: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_random(random_config("qwen3_5_text", "tiny"), checkpoint)
    write_text_files(checkpoint, "qwen3_5_text")
    bundle = build(checkpoint, tmp_path / "bundle")
    for device in ("openvino", "language=openvino"):
        with pytest.raises(ppexport.BundleError, match="OpenVINO; build it with --dialect plain"):
            ppexport.load(bundle, device)
    with pytest.raises(ppexport.BackendError, match="expected none for the vision stage"):
        ppexport.load(bundle, TOWER)
    ran = runner().invoke(main, ["doctor", str(bundle)])
    assert ran.exit_code == 0, ran.output
    assert "vision=openvino" not in ran.output


def test_doctor_tells(own_bundle: Path, installed: Path) -> None:
    ran = runner().invoke(main, ["doctor", str(own_bundle)])
    assert ran.exit_code == 0, ran.output
    lines = {line[:22].strip(): line[22:] for line in ran.stdout.splitlines()}
    assert "CPU" in lines["OpenVINO"]
    assert "openvino" in lines["can run on"]
    assert lines["on vision=openvino"] == "runs"
    assert "expected 'plain'" in lines["on openvino"]
    assert lines["auto"].startswith("onnxruntime-cpu: the bundle has no engines")
    assert "ONNX Runtime " in lines["vision tower"]
    assert "OpenVINO " in lines["vision tower"]
