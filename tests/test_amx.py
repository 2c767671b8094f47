"""The tower on OpenVINO as a CPU with AMX runs it, which few that test it have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import emulated_amx
import numpy as np
import pytest
from conftest import E2E_PIXELS, GOLDEN, cosines

import ppexport
from ppexport.build_bundle import build
from ppexport.models.precision import Wanted

pytestmark = pytest.mark.skipif(emulated_amx.lacks() is not None, reason=f"{emulated_amx.lacks()}")

SCREEN = GOLDEN.parent.parent / "docs" / "settings.png"
TOWER = "vision=openvino"
# writes features, prints what is executed: kinds and kernels
SEE = f"""
import json, sys, numpy, ppexport
pipe = ppexport.load(sys.argv[1], {TOWER!r}, max_pixels={E2E_PIXELS}, threads=2)
numpy.save(sys.argv[2], pipe.encode({str(SCREEN)!r}).embeds)
nodes = pipe.vision.session.model.get_runtime_model().get_ordered_ops()
print(json.dumps([[node.rt_info[key].astype(str) for key in ("layerType", "primitiveType")] for node in nodes]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return emulated_amx.emulated(tmp_path_factory.mktemp("amx"))


@pytest.mark.parametrize(
    ("vision", "kernel"),
    [
        ("bf16", "brgemm_avx512_amx_bf16"),
        ("w8a8", "brgemm_avx512_amx_I8"),
        ("int8", "brgemm_avx512_amx_bf16"),
    ],
)
def test_products_are_those_of_amx(
    environment: dict[str, str], vision: str, kernel: str, tmp_path: Path
) -> None:
    """Every product of a layer, attention in one kernel; features as on a CPU without AMX."""
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", Wanted("int8", vision=vision))
    pipe = ppexport.load(bundle, TOWER, max_pixels=E2E_PIXELS, threads=2)
    expected = pipe.encode(SCREEN).embeds
    command = [sys.executable, "-c", SEE, str(bundle), str(tmp_path / "features.npy")]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kinds = [tuple(each) for each in json.loads(run.stdout)]
    depth = pipe.manifest.model.vision.depth
    assert kinds.count(("FullyConnected", kernel)) >= 4 * depth
    assert {"Softmax", "MatMul"}.isdisjoint(kind for kind, _ in kinds)
    counts = {name: int(count) for count, name in re.findall(r"(\d+) products of (\w+)", run.stderr)}
    assert counts["bfloat16"] > 0  # those of attention
    assert (counts["bytes"] > 0) == (vision == "w8a8")
    found = np.load(tmp_path / "features.npy")
    assert cosines(found, expected).min() > (
        0.999 if vision == "w8a8" else 0.9999
    )  # inputs may round otherwise
