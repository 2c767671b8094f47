"""A pytest plugin: the fixture ``latency`` holds a bundle to the times of a baseline in your repository.

    def test_latency(latency):
        latency.check("my.bundle", "screens/", baseline="latency/orin.json", tolerance="5%")

``pytest --latency-update`` writes the baselines anew. Imports of ppexport happen when the fixture is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

SKIPPED = "latency"  # what the reasons of skipped checks begin with

if TYPE_CHECKING:
    from .compare import Comparison


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that writes baselines."""
    group = parser.getgroup("ppexport")
    group.addoption(
        "--latency-update", action="store_true", help="Write the baselines of latency checks anew."
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say why latency checks were skipped, also where pytest was not asked for reasons (-rs)."""
    for report in terminalreporter.getreports("skipped"):
        if isinstance(report.longrepr, tuple) and report.longrepr[2].startswith(f"Skipped: {SKIPPED}"):
            terminalreporter.section(f"{report.nodeid} was skipped")
            terminalreporter.line(report.longrepr[2].removeprefix("Skipped: "))


@pytest.fixture
def latency(request: pytest.FixtureRequest) -> Latency:
    """Holds bundles to baselines; see Latency.check."""
    return Latency(request.path.parent, bool(request.config.getoption("--latency-update")))


class Latency:
    """What the fixture gives. Relative paths are from ``root``, the folder of the test."""

    def __init__(self, root: Path, update: bool):
        self.root = root
        self.update = update

    def check(
        self,
        bundle: str | os.PathLike[str],
        workload: str | os.PathLike[str],
        baseline: str | os.PathLike[str],
        tolerance: float | str = "5%",
        metrics: Sequence[str] | None = None,
        accuracy: bool = True,
        attempts: int = 3,
        **plan: Any,
    ) -> Comparison | None:
        """Measure, compare with the baseline, and fail the test if something regressed.

        ``workload``: a folder of images, or the name of a built-in one (workload.py). ``plan``: fields of
        measure.Plan, such as taus=(0.0, None), rounds=20, device="tensorrt". It is measured up to ``attempts`` times,
        until one measurement passes; a regression has to show in all of them. The test is skipped, with the reason,
        if nothing can be told (another machine, too much noise). ``accuracy``: right answers that were lost fail it,
        too, where the workload knows the right ones. With ``--latency-update`` the baseline is written and None
        returned.
        """
        __tracebackhide__ = True
        from ..models.errors import PpexportError

        try:
            return self._check(
                bundle, workload, baseline, tolerance, metrics, accuracy, max(1, attempts), plan
            )
        except PpexportError as err:
            pytest.fail(str(err), pytrace=False)

    def _check(
        self,
        bundle: str | os.PathLike[str],
        workload: str | os.PathLike[str],
        baseline: str | os.PathLike[str],
        tolerance: float | str,
        metrics: Sequence[str] | None,
        accuracy: bool,
        attempts: int,
        plan: dict[str, Any],
    ) -> Comparison | None:
        __tracebackhide__ = True
        from . import compare as judge
        from . import machine, schema
        from .commands import share
        from .measure import Plan, measure
        from .workload import BUILT_IN, open_workload

        path = self.root / baseline
        where = self.root / bundle
        limit = share(tolerance)
        is_name = str(workload) in BUILT_IN and not (self.root / workload).exists()
        name, questions = open_workload(str(workload), [] if is_name else [str(self.root / workload)], None)
        asked = Plan(**{"cold": 0, "pictures": False, **plan})
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            schema.write(measure(str(where), name, questions, asked), path)
            return None
        if not path.exists():
            pytest.fail(
                f"{path}: there is no such baseline; write it with: pytest --latency-update", pytrace=False
            )
        base = schema.read(path)
        judge.parse(metrics)
        if apart := machine.differences(base.machine, machine.describe()):
            pytest.skip(
                f"{SKIPPED}: {path.name} is of another machine ({'; '.join(apart)}); write one with --latency-update"
            )
        judged = accuracy and any(setting.answered for setting in base.settings)
        found = []
        for _ in range(attempts):
            result = measure(str(where), name, questions, asked)
            found.append(judge.compare(base, result, limit, metrics, judged))
            if found[-1].exit_code == 0:
                return found[-1]
        table = "\n".join(judge.text(found[-1]))
        if all(each.exit_code == 1 for each in found):
            pytest.fail(
                f"slower than {path.name}, or wrong, in each of {attempts} measurements:\n{table}",
                pytrace=False,
            )
        pytest.skip(
            f"{SKIPPED}: it cannot be told, in {attempts} measurements, the last of which is:\n{table}"
        )
