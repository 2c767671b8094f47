"""Fixtures: golden data, bundles built once per run, small random checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import ppexport
from ppexport.build_bundle import build
from ppexport.exporters import graphs
from ppexport.exporters.dialects import Dialect
from ppexport.models.config import ModelConfig

GOLDEN = Path(__file__).parent / "golden"
IMAGES = Path(__file__).parent.parent / "ppexport" / "bench" / "images"  # real ones, which ship with the package
E2E_PIXELS = 600000  # max_pixels of the e2e cases


@pytest.fixture(scope="session", autouse=True)
def traces() -> Iterator[dict[str, ir.Model]]:
    """Graphs by what they were traced from: that takes most of a build. Clear it to trace anew."""
    traced: dict[str, ir.Model] = {}

    def once(trace: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
        def traced_once(
            config: ModelConfig, dialect: Dialect, precision: str = "fp32", wide: Sequence[str] = ()
        ) -> ir.Model:
            key = repr((trace.__name__, config, dialect.name, precision, sorted(wide)))
            if key not in traced:
                traced[key] = trace(config, dialect, precision, wide)
            return traced[key].clone()

        return traced_once

    with pytest.MonkeyPatch.context() as patch:
        for name in ("vision_graph", "language_graph"):
            patch.setattr(graphs, name, once(getattr(graphs, name)))
        yield traced


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint, built in float32 for ONNX Runtime."""
    return build(GOLDEN / "e2e" / "model", tmp_path_factory.mktemp("golden") / "bundle")


@pytest.fixture(scope="session")
def golden_pipe(golden_bundle: Path) -> ppexport.Pipeline:
    """It computes every request anew, so that tests do not depend on those before them."""
    return ppexport.load(golden_bundle, max_pixels=E2E_PIXELS, reuse=0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint with tokenizer, chat template and preprocessor configuration."""
    from ppexport.exporters.random_checkpoint import qwen3_vl_config, write_random, write_text_files

    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_random(qwen3_vl_config("tiny"), directory)
    write_text_files(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_checkpoint, tmp_path_factory.mktemp("tiny-bundle") / "bundle")


@pytest.fixture(scope="session")
def tiny_pipe(tiny_bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(tiny_bundle, min_pixels=32 * 32, max_pixels=256 * 256)


@pytest.fixture
def screen() -> np.ndarray:
    """A 128 x 160 picture with flat areas and detail: 4 x 5 tokens."""
    picture = np.full((128, 160, 3), 240, np.uint8)
    picture[:32] = (30, 60, 90)
    picture[40:60, 20:100] = np.random.default_rng(0).integers(0, 255, (20, 80, 3), np.uint8)
    return picture


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
