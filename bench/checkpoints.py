"""Random checkpoints and their bundles, made by processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def random_checkpoint(shape: str, directory: Path, family: str = "qwen3_vl") -> Path:
    """A checkpoint of one of random_checkpoint.SHAPES, in a new directory."""
    made = directory / "checkpoint"
    command = [sys.executable, "-m", "ppexport.exporters.random_checkpoint", str(made)]
    subprocess.run([*command, "--family", family, "--shape", shape], check=True)
    return made


def build(checkpoint: Path, directory: Path, precision: str) -> Path:
    """A bundle, named by its precision."""
    output = directory / precision
    command = [sys.executable, "-m", "ppexport.cli", "build", str(checkpoint), "-o", str(output), "-q"]
    subprocess.run([*command, "--precision", precision], check=True)
    return output
