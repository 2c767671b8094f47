"""Imports go one way, and the runtime needs neither torch nor anything of the export side."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, IMAGES

from ppexport.build_bundle import build

ROOT = Path(__file__).resolve().parent.parent
EXPORT_ONLY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes"}
# the trainer stands beside the checkpoint it makes; nothing else imports it
TRAINER = [
    ROOT / "models" / "pocket" / name
    for name in ("lessons.py", "network.py", "report.py", "save.py", "train.py")
]
MAY_IMPORT = {
    "models": {"models"},
    "runtime": {"models", "runtime"},
    "exporters": {"models", "exporters"},
}


def imports(file: Path) -> set[str]:
    """Top-level packages that a module imports; the project's own by folder name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            parts = [*file.relative_to(ROOT).parts[:-1]][: -(node.level - 1) or None]
            parts += (node.module or "").split(".")
            found.add(next((p for p in parts if p), ""))
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        if file in TRAINER:
            continue
        own = {"models", "runtime", "exporters", "ppexport"} & imports(file)
        assert own <= MAY_IMPORT[folder], file
        if folder != "exporters":
            assert not imports(file) & EXPORT_ONLY, file


def test_whole_path_without_torch(golden_bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """select, encode, generate_tokens, generate and the commands run where importing the export packages raises."""
    script = tmp_path / "run.py"
    script.write_text(
        f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXPORT_ONLY!r}:
            raise ImportError(f"{{name}} is refused here")
sys.meta_path.insert(0, Refuse())
try:
    import torch
    raise SystemExit("the block does not work")
except ImportError:
    pass
import numpy as np
import ppexport
image = {str(IMAGES / "web_gnuplot.png")!r}
golden = np.load({str(GOLDEN / "e2e" / "one_tau0.npz")!r})
assert ppexport.select(image).kept == 198
pipe = ppexport.load({str(golden_bundle)!r}, max_pixels=600000)
steps = list(pipe.generate_tokens(golden["input_ids"], [image], ppexport.PixelPrune(), max_new_tokens=12))
assert [s.token for s in steps] == golden["generated"].tolist()
assert pipe.encode(image).embeds.shape == (159, 128)
from ppexport.cli import main
main(["run", {str(tiny_bundle)!r}, "-i", image, "Title?", "-n", "4"], standalone_mode=False)
main(["inspect", image, "--overlay", {str(tmp_path / "o.png")!r}], standalone_mode=False)
main(["doctor", {str(tiny_bundle)!r}], standalone_mode=False)
main(["plan", image, "-o", {str(tmp_path / "p.json")!r}], standalone_mode=False)
import ppexport.verify  # for verify --against-cpu
print("through")
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("through\n")


def test_engines_compile_without_torch_and_onnx(tmp_path: Path) -> None:
    """What runs on a Jetson, with the compiler that runs here."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", "bf16", "standard")
    script = f"""
import sys
for name in {EXPORT_ONLY!r}:
    sys.modules[name] = None
from ppexport.cli import main
arguments = ["build", {str(bundle)!r}, "--target", "tensorrt-rtx", "--capacity", "256", "--max-pixels", "65536"]
main(arguments, standalone_mode=False)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (bundle / "engines" / "tensorrt-rtx" / "language.engine").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("blocked", "code", "message"),
    [
        (
            "onnxruntime",
            "ppexport.load(bundle)",
            r"onnxruntime is not installed.*pip install 'ppexport\[cpu\]'",
        ),
        (
            "torch",
            "build(checkpoint, '/nowhere/x')",
            r"torch is not installed.*pip install 'ppexport\[export\]'",
        ),
    ],
)
def test_missing_package_names_the_extra(
    blocked: str, code: str, message: str, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    script = f"""
import sys, re
sys.modules[{blocked!r}] = None
import ppexport
from ppexport.build_bundle import build
bundle, checkpoint = {str(tiny_bundle)!r}, {str(tiny_checkpoint)!r}
try:
    {code}
except ppexport.BackendError as err:
    assert re.search({message!r}, str(err)), err
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
