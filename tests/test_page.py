"""The page of ``ppexport serve`` in a real browser: a picture is shown, pruned and asked about, also on a phone."""

from __future__ import annotations

import base64
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Server, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
SCREEN = Path(__file__).parent.parent / "docs" / "settings.png"
FURTHER = [(360, "dark"), (800, "light"), (800, "dark"), (3840, "light")]
GREEN = np.array([0, 166, 80])


@pytest.fixture(scope="module")
def server(pocket_bundle: Path) -> Iterator[Server]:
    with serving(pocket_bundle, "--name", "pocket") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page as it is opened; whatever it writes to the console fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    found = context.new_page()
    told: list[str] = []
    found.on("console", lambda message: told.append(message.text))
    found.on("pageerror", lambda error: told.append(str(error)))
    found.goto(server.url)
    expect(found, "#about").to_contain_text("pocket: qwen3_vl")
    yield found
    context.close()
    assert [text for text in told if "400" not in text] == []  # a refused request is told there, too


def expect(page: Any, selector: str) -> Any:
    """Waits for what is then asserted."""
    return sync_api.expect(page.locator(selector))


def shown(page: Any) -> np.ndarray:
    """The pixels of the canvas, uint8 [H, W, 3]."""
    page.locator("#picture").wait_for(state="visible")
    data = page.evaluate("document.getElementById('picture').toDataURL().split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def with_picture(page: Any) -> None:
    page.set_input_files("#file", str(SCREEN))
    expect(page, "#kept").to_contain_text("tokens kept")


def test_what_is_kept_is_drawn(page: Any) -> None:
    with_picture(page)
    assert "48 of 143 tokens kept, 33.6 %" in page.inner_text("#kept")
    pixels = shown(page).astype(int)
    assert pixels.shape == (352, 416, 3)
    original = np.asarray(Image.open(SCREEN).convert("RGB").resize((416, 352))).astype(int)
    unchanged = np.abs(pixels - original).max(2) < 12
    assert 0.2 < unchanged.mean() < 0.4  # kept blocks, but for their outline
    assert (np.abs(pixels - GREEN).max(2) < 60).sum() > 1000


def test_moving_the_sliders_changes_it_at_once(page: Any) -> None:
    with_picture(page)
    before = page.inner_text("#kept")
    page.fill("#tau", "60")
    expect(page, "#kept").not_to_have_text(before)
    assert int(page.inner_text("#kept").split()[0]) < 48
    page.fill("#most", "20")
    expect(page, "#kept").to_contain_text("20 of 143")
    page.check("#off")
    expect(page, "#kept").to_contain_text("143 of 143")
    page.uncheck("#off")
    page.fill("#most", "")
    page.fill("#prunesid", "11")
    expect(page, "#kept").to_contain_text("11 of 143")


def test_an_answer_streams_with_its_times(page: Any) -> None:
    with_picture(page)
    page.fill("#question", "What is the Region?")
    page.press("#question", "Control+Enter")
    expect(page, ".answer").to_have_text("Porto")
    expect(page, ".bars").to_contain_text("per second")
    bars = page.inner_text(".bars")
    for stage in ("prune", "vision", "prefill", "decode", "first token"):
        assert stage in bars
    assert "95 pruned" in bars
    page.fill("#tau", "1")
    expect(page, "#kept").to_contain_text("first token after about")


def test_beside_the_answer_without_pruning(page: Any) -> None:
    with_picture(page)
    page.fill("#question", "What is the Region?")
    page.check("#both")
    page.click("#ask")
    expect(page, ".answer").to_have_text(["Porto", "Porto"])
    expect(page, "#ask").to_be_enabled()
    assert page.locator(".answers strong").all_inner_texts() == ["Pruned", "Every token"]


def test_code_to_copy_runs(page: Any, server: Server, tmp_path: Path) -> None:
    """What the page offers answers as the page does."""
    with_picture(page)
    page.fill("#question", 'What is the "Region"? It\'s $HOME `here`')
    shutil.copy(SCREEN, tmp_path / "picture.png")
    said = []
    for kind, command in (("curl", ["bash", "-c"]), ("python", [sys.executable, "-c"])):
        code = page.inner_text(f"#{kind}")
        done = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[1].strip() in said[0]


def test_what_goes_wrong_is_told(page: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#file", str(tmp_path / "text.png"))
    expect(page, "#picture-error").to_have_text("The browser cannot show that picture.")
    with_picture(page)
    page.fill("#question", "word " * 3000)
    page.click("#ask")
    expect(page, "#answers .error").to_contain_text("the prompt takes")


def test_it_works_with_the_keyboard_alone(page: Any) -> None:
    """Every control is reached by Tab and has a name that is read out."""
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.dataset.copy || ''")
        )
    assert [name for name in reached if name][:9] == [
        *("file", "tau", "method", "most", "prunesid", "off", "question", "ask", "both"),
    ]
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input,select,textarea')].filter(e => !e.labels.length).map(e => e.id)"
    )
    assert unnamed == []


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(360, "light"), (3840, "dark"), *(pytest.param(*each, marks=pytest.mark.slow) for each in FURTHER)],
)
def test_it_fits_every_screen(browser: Any, server: Server, width: int, scheme: str, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.url)
    with_picture(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#picture").bounding_box()
    assert box["width"] <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    level = sum(int(part) for part in ground.removeprefix("rgb(").rstrip(")").split(","))
    assert (level < 200) == (scheme == "dark")
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    context.close()


def test_nothing_is_loaded_from_elsewhere(server: Server) -> None:
    text = (Path(__file__).parent.parent / "ppexport" / "server" / "page.html").read_text(encoding="utf-8")
    assert "https://" not in text
    status, _, headers = server.ask(None, "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
