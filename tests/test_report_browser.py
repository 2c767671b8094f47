"""The report in a real browser, without a window: wide and as on a phone, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ppexport.bench.measure import Plan, measure
from ppexport.bench.report import render
from ppexport.bench.workload import open_workload
from ppexport.build_bundle import build

POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const style = getComputedStyle(document.body);
  const plots = [...document.querySelectorAll("figure svg")];
  const found = {
    width: innerWidth, needed: document.documentElement.scrollWidth,
    images: images.length, shown: images.filter(image => image.naturalWidth > 0).length,
    plots: plots.map(plot => plot.getBoundingClientRect().width),
    letters: plots.map(plot => plot.querySelector("text").getBoundingClientRect().height),
    tables: [...document.querySelectorAll("table")].map(table => table.id),
    after: [...document.querySelectorAll("figure:has(svg)")].every(
      figure => figure.nextElementSibling.querySelector("table")),
    ink: style.color, paper: style.backgroundColor,
    plotInk: getComputedStyle(plots[0].querySelector("text")).fill,
  };
  const pre = document.createElement("pre");
  pre.id = "probe"; pre.textContent = JSON.stringify(found);
  document.body.append(pre);
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    bundle = build(POCKET, tmp_path_factory.mktemp("browser") / "pocket.bundle")
    name, questions = open_workload("screens", [], None)
    result = measure(str(bundle), name, questions[:4], Plan(rounds=3, warmup=0, cold=0, max_new_tokens=8))
    return render([result], ["result"])


@pytest.mark.parametrize("width", [1200, 500])  # the browser makes no window narrower than that
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable(page: str, width: int, dark: bool, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    assert BROWSER is not None
    quiet = (
        "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    )
    command = [
        *(BROWSER, "--headless", *quiet.split(), "--disable-sync", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"),
        *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert match, done.stderr[-2000:]
    found = json.loads(match[1])
    assert found["needed"] <= found["width"]  # tables scroll by themselves
    assert found["images"] == found["shown"] == 4
    assert len(found["plots"]) == 5
    assert min(found["plots"]) > 300
    assert min(found["letters"]) >= 8
    assert found["tables"] == [
        "overview",
        "stages",
        "percentiles-1",
        "percentiles-2",
        "percentiles-3",
        "kept",
    ]
    assert found["after"]
    ink, paper = (sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("ink", "paper"))
    assert (ink > 600 and paper < 120) if dark else (ink < 120 and paper > 600)
    assert found["plotInk"] == found["ink"]
