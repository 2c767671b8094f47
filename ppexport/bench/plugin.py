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

if TYPE_CHECKING:
    from .compare import Comparison


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that writes baselines."""
    group = parser.getgroup("ppexport")
    group.addoption("--latency-update", action="store_true", help="Write the baselines of latency checks anew.")


@pytest.fixture
def latency(request: pytest.FixtureRequest) -> Latency:
    """Holds bundles to baselines; see Latency.check."""
    return Latency(Path(request.config.rootpath), bool(request.config.getoption("--latency-update")))


class Latency:
    """What the fixture gives. Relative paths are from ``root``, pytest's root directory."""

    def __init__(self, root: Path, update: bool):
        self.root, self.update = root, update

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

        ``workload``: "desktop", "documents", "screens", or a folder of images (bench/workload.py). ``plan``: fields of
        measure.Plan, such as taus=(0.0, None), rounds=20, device="tensorrt"; a regression has to show in each of
        ``attempts`` measurements, and what cannot be told is measured as often. The test is skipped, with the reason,
        if it cannot be told at all (another machine, too much noise). ``accuracy``: right answers that were lost fail
        it, too, where the workload knows the right ones. With ``--latency-update`` the baseline is written and None
        returned.
        """
        __tracebackhide__ = True
        from . import compare as judge
        from . import schema
        from .commands import share
        from .measure import Plan, measure
        from .workload import BUILT_IN, open_workload

        path, where = self.root / baseline, self.root / bundle
        folder = [] if str(workload) in BUILT_IN else [str(self.root / workload)]
        name, questions = open_workload(str(workload), folder, None)
        asked = Plan(**{"cold": 0, "pictures": False, **plan})
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            schema.write(measure(str(where), name, questions, asked), path)
            return None
        if not path.exists():
            pytest.fail(f"{path}: there is no such baseline; write it with: pytest --latency-update", pytrace=False)
        base = schema.read(path)
        judged = accuracy and any(setting.answered for setting in base.settings)
        for _ in range(max(1, attempts)):
            result = measure(str(where), name, questions, asked)
            found = judge.compare(base, result, share(tolerance), metrics, judged)
            if found.exit_code == 0:
                return found
        table = "\n".join(judge.text(found))
        if found.exit_code == 1:
            pytest.fail(f"slower than {path.name}, or wrong:\n{table}", pytrace=False)
        pytest.skip(f"cannot be told:\n{table}")
