"""Imports go one way: models <- runtime, models <- exporters, everything <- ppexport."""

from __future__ import annotations

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"models": {"models"}, "runtime": {"models", "runtime"}, "exporters": {"models", "exporters"}}


@pytest.mark.parametrize("package", ALLOWED)
def test_direction(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    for file in files:
        home = ("ppexport", *file.relative_to(ROOT).parent.parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                named = [*home[: len(home) - node.level + 1], *(node.module or "").split(".")]
            elif isinstance(node, ast.ImportFrom):
                named = (node.module or "").split(".")
            else:
                continue
            if named[0] == "ppexport":
                ours = named[1] or node.names[0].name
                assert ours in ALLOWED[package], f"{file}:{node.lineno}"


def test_every_package_is_installed() -> None:
    """setup.cfg lists packages one by one: one that it forgets is missing in an installed copy only."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = [ROOT / "ppexport", *(ROOT / package for package in ALLOWED)]
    found = set()
    for folder in folders:
        for file in folder.rglob("__init__.py"):
            parts = file.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "ppexport" else ("ppexport", *parts)))
    assert listed == found
