"""The tower on OpenVINO as a CPU with AMX runs it, which few that test it have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import emulated_amx
import numpy as np
import pytest
from conftest import E2E_PIXELS, GOLDEN, cosines

import ppexport
from ppexport.build_bundle import build
from ppexport.models.config import VisionConfig
from ppexport.models.precision import Wanted

pytestmark = pytest.mark.skipif(emulated_amx.lacks() is not None, reason=f"{emulated_amx.lacks()}")

SCREEN = GOLDEN.parent.parent / "docs" / "settings.png"
TOWER = "vision=openvino"
# writes features, prints what is executed: kinds and kernels
SEE = f"""
import json, sys, numpy, ppexport
pipe = ppexport.load(sys.argv[1], {TOWER!r}, max_pixels={E2E_PIXELS}, threads=2)
numpy.save(sys.argv[2], pipe.encode({str(SCREEN)!r}, None).embeds)
nodes = pipe.vision.session.model.get_runtime_model().get_ordered_ops()
print(json.dumps([[node.rt_info[key].astype(str) for key in ("layerType", "primitiveType")] for node in nodes]))
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        yield emulated_amx.emulated(Path(folder))


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
    """Every product of a layer, its attention and rotations in one kernel each; features as on a CPU without AMX."""
    bundle = build(GOLDEN / "e2e" / "model", tmp_path / "bundle", Wanted("int8", vision=vision))
    pipe = ppexport.load(bundle, TOWER, max_pixels=E2E_PIXELS, threads=2)
    expected = pipe.encode(SCREEN, None).embeds
    command = [sys.executable, "-c", SEE, str(bundle), str(tmp_path / "features.npy")]
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = np.load(tmp_path / "features.npy")
    assert cosines(found, expected).min() > 0.999  # sums in another order may round otherwise

    kinds = [tuple(each) for each in json.loads(run.stdout)]
    tower = pipe.manifest.model.vision
    assert kinds.count(("FullyConnected", kernel)) >= 4 * tower.depth
    assert [kind for kind, _ in kinds].count("RoPE") == 2 * tower.depth
    assert {"Softmax", "MatMul"}.isdisjoint(kind for kind, _ in kinds)

    counts = {name: int(count) for count, name in re.findall(r"(\d+) products of (\w+)", run.stderr)}
    assert (counts["bytes"] > 0) == (vision == "w8a8")
    if vision == "w8a8":
        patches = tower.merge**2 * len(expected)
        fewest = embedding(tower, patches) + attention(tower, patches)
        assert fewest <= counts["bfloat16"] < 1.1 * fewest  # edges are cut into more tiles


def embedding(tower: VisionConfig, patches: int) -> int:
    """Products of tiles, 16 x 32 values by 32 x 16, that make embeddings of patches."""
    return ceil(patches / 16) * ceil(3 * tower.patch**2 / 32) * ceil(tower.width / 16)


def attention(tower: VisionConfig, patches: int) -> int:
    """Those of queries and keys, then those of shares and values, of all layers."""
    rows = ceil(patches / 16)
    scores = rows * rows * ceil(tower.head_dim / 32)
    return tower.depth * tower.heads * (scores + rows * ceil(tower.head_dim / 16) * ceil(patches / 32))
