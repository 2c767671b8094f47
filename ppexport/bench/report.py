"""One page of HTML that needs nothing else: plots as SVG (matplotlib), a table under each, the pruned pictures."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from ..models.errors import BackendError
from .measure import by_round
from .schema import STAGES, Result, Setting, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).parent / "report.html"
INK = "#010203"  # becomes the colour of the page's text
COLOURS = (
    "#8a8f98",
    "#e69f00",
    "#2f8fd8",
    "#17a67c",
    "#cc6fa5",
    "#b58900",
    "#7a6fd0",
    "#d05c4c",
)  # on light and dark
TITLES = {
    "ttft": "Time to first token (ttft)",
    "tpot": "Time per output token (tpot)",
    "e2el": "End-to-end latency (e2el)",
}
WIDTH = 6.2  # inches; at this size the letters are those of the page


@dataclass(frozen=True)
class Row:
    """One setting of one result."""

    name: str
    result: Result
    setting: Setting

    def median(self, metric: str) -> float:
        """Milliseconds, 0 for a stage that did not run."""
        found = self.setting.metrics.get(metric)
        return found.median.value if found else 0.0


def render(results: Sequence[Result], names: Sequence[str]) -> str:
    """The page; ``names`` of the results, for where there are several. Raises BackendError without matplotlib."""
    prefixes = [f"{name}: " if len(results) > 1 else "" for name in names]
    rows = [
        Row(p + s.name, result, s)
        for p, result in zip(prefixes, results, strict=True)
        for s in result.settings
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        overview=[_overview(row) for row in rows],
        stages=_figure(partial(_stage_bars, rows), 0.9 + 0.42 * len(rows)),
        stage_table=[[row.name, *(_ms(row.median(stage)) for stage in STAGES)] for row in rows],
        stage_names=STAGES,
        distributions=[
            (title, _figure(partial(_distribution, rows, metric), 3.2), _percentiles(rows, metric))
            for metric, title in TITLES.items()
            if any(metric in row.setting.metrics for row in rows)
        ],
        kept=_figure(partial(_kept, rows), 3.2),
        kept_table=[cells for row in rows for cells in _kept_cells(row)],
        ms=_ms,
        gigabytes=lambda count: f"{count / 1e9:.2f} GB",
    )


def _ms(value: float) -> str:
    """Milliseconds with three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _overview(row: Row) -> list[str]:
    s = row.setting
    share = f" ({s.kept / s.total:.0%})" if s.total else ""
    accuracy = "" if not s.answered or s.correct is None else f"{s.correct / s.answered:.1%}"
    times = (_ms(row.median(name)) for name in ("ttft", "tpot", "e2el"))
    return [
        row.name,
        f"{s.kept} of {s.total}{share}",
        *times,
        f"{s.request_throughput:.2f}",
        f"{s.output_throughput:.1f}",
        accuracy,
    ]


def _percentiles(rows: Sequence[Row], metric: str) -> list[list[str]]:
    return [
        [row.name, str(found.n), *(_cell(found, name) for name in ("mean", "median", "p90", "p95", "p99"))]
        for row in rows
        if (found := row.setting.metrics.get(metric))
    ]


def _cell(summary: Summary, name: str) -> str:
    found = getattr(summary, name)
    return f"{_ms(found.value)} ({_ms(found.low)} to {_ms(found.high)})"


def _kept_cells(row: Row) -> list[list[str]]:
    return [
        [row.name, row.result.items[item].image, f"{kept} of {total}", _ms(ttft)]
        for item, kept, total, ttft in _by_item(row)
    ]


def _by_item(row: Row) -> list[tuple[int, int, int, float]]:
    """(item, kept tokens, all tokens, median time to first token)."""
    found = []
    for item in range(len(row.result.items)):
        requests = [r for r in row.setting.requests if r.item == item]
        if requests:
            found.append(
                (item, requests[0].kept, requests[0].total, float(np.median([r.ttft for r in requests])))
            )
    return found


def _stage_bars(rows: Sequence[Row], axes: Axes) -> None:
    left = np.zeros(len(rows))
    for stage, colour in zip(STAGES, COLOURS, strict=False):
        widths = np.array([row.median(stage) for row in rows])
        axes.barh(range(len(rows)), widths, left=left, color=colour, label=stage, height=0.6)
        left += widths
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms, medians")
    axes.legend(ncols=len(STAGES), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, handlelength=1)


def _distribution(rows: Sequence[Row], metric: str, axes: Axes) -> None:
    """Share of requests that took at most so long."""
    for row, colour in zip(rows, COLOURS[1:] * len(rows), strict=False):
        groups = by_round(row.setting.requests, metric)
        if groups:
            values = np.sort(np.concatenate(groups))
            axes.step(
                values,
                np.arange(1, len(values) + 1) / len(values),
                where="post",
                color=colour,
                label=row.name,
            )
    axes.set_xlabel("ms")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)


def _kept(rows: Sequence[Row], axes: Axes) -> None:
    for row, colour in zip(rows, COLOURS[1:] * len(rows), strict=False):
        points = _by_item(row)
        axes.scatter([p[1] for p in points], [p[3] for p in points], color=colour, label=row.name, s=28)
    axes.set_xlabel("image tokens kept")
    axes.set_ylabel("ttft, ms, medians")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _figure(draw: Callable[[Any], None], height: float) -> str:
    """An SVG whose text is text, in the page's colour."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as err:
        raise BackendError(
            f"{err.name} is not installed; 'ppexport bench report' needs: pip install 'ppexport[bench]'"
        ) from err
    settings: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a $ is a $
        "font.size": 9,
        "font.family": "sans-serif",
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that its font lacks: the browser has others
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        written = StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # several plots share a page, so only ids that something in the plot points to stay, with a name of their own
    used = set(re.findall(r"#([\w.-]+)", svg))
    salt = f"p{abs(hash(svg)) % 10**9}-"
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{salt}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)([\w.-]+)', lambda m: f"{m[1]}{salt}{m[2]}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for size in ("width", "height"):  # it takes the width of the page
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    return svg
