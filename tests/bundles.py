"""The bundles that many tests run, and where they come from: built here, or by another environment.

    python tests/bundles.py DIRECTORY

builds all of them, for an environment that has no exporter (``make test-oldest``): pytest --bundles DIRECTORY.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("golden", "golden-plain", "golden-int4", "tiny", "pocket")


def build_one(name: str, output: Path) -> Path:
    """Build the bundle called ``name``, one of NAMES, into ``output``."""
    from ppexport import build
    from ppexport.models.precision import Wanted

    if name == "pocket":
        return build(ROOT / "models" / "pocket", output)
    if name == "tiny":
        return build(tiny_checkpoint(output.with_name(f"{output.name}-checkpoint")), output)
    dialect = "plain" if name.endswith("plain") else "auto"
    # its vision tower in floats: w8a8, which goes with int4, does not run on every CPU
    precision = Wanted("int4", vision="fp32") if name.endswith("int4") else "auto"
    return build(ROOT / "tests" / "golden" / "e2e" / "model", output, precision, dialect=dialect)


def tiny_checkpoint(directory: Path) -> Path:
    """A small random checkpoint with tokenizer, chat template and preprocessor configuration."""
    from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files

    write_random(random_config("qwen3_vl", "tiny"), directory)
    write_text_files(directory)
    return directory


if __name__ == "__main__":
    for each in NAMES:
        if not (Path(sys.argv[1]) / each).exists():
            build_one(each, Path(sys.argv[1]) / each)
