"""Pages of PDF files as images: named, drawn at the model's size, refused in one line."""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from terminal import runner

import ppexport
from ppexport.cli import main
from ppexport.models.family import Views
from ppexport.runtime import pdf
from ppexport.runtime.image import frames_of, read

pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed")
WORDS = ("Porto", "Milan", "Quito")


def content(word: str) -> bytes:
    return f"0.2 0.4 0.9 rg 72 700 200 50 re f BT /F1 36 Tf 72 600 Td 0 g ({word}) Tj ET".encode()


def document(pages: list[bytes], size: tuple[float, float] = (595, 842), trailer: bytes = b"") -> bytes:
    """A PDF with these page contents, written by hand."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    kids = []
    for stream in pages:
        kids.append(len(objects) + 1)
        box = f"[0 0 {size[0]} {size[1]}]".encode()
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox " + box + b" /Resources << /Font << /F1 3 0 R >> >> "
            b"/Contents %d 0 R >>" % (len(objects) + 2)
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    listed = b" ".join(b"%d 0 R" % kid for kid in kids)
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(kids), listed)
    out = io.BytesIO(b"")
    out.write(b"%PDF-1.4\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(
        b"trailer << /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n"
        % (len(objects) + 1, trailer, start)
    )
    return out.getvalue()


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.pdf"
    path.write_bytes(document([content(word) for word in WORDS]))
    return path


def test_a_page_has_the_size_that_is_asked_for(report: Path) -> None:
    """150 dots an inch, or as the limits of the model have it: drawn, not resampled."""
    usual = read(str(report))
    assert usual.size == (1240, 1754)
    frames, _ = frames_of(f"{report}#2", lambda height, width: Views.whole(704, 512, 32))
    assert frames[0].shape == (704, 512, 3)
    with pdf.Page(report.read_bytes(), 2, "page") as page:
        drawn = page.draw(512, 704)
    np.testing.assert_array_equal(frames[0], np.asarray(drawn))
    assert frames[0][0, 0].tolist() == [255, 255, 255]
    assert frames[0][95, 100].tolist() == [51, 102, 230]  # the bar, red before blue


def test_names_of_pages(report: Path) -> None:
    assert pdf.expanded("a.png") == ["a.png"]
    assert pdf.expanded(str(report)) == [str(report)]
    assert pdf.page_name("x.pdf") is None  # what it holds says what it is
    assert pdf.expanded("x.PDF#2-4") == ["x.PDF#2", "x.PDF#3", "x.PDF#4"]
    pages = [read(f"{report}#{number}") for number in (1, 2, 3)]
    assert len({page.tobytes() for page in pages}) == 3
    assert read(report.read_bytes()).tobytes() == pages[0].tobytes()
    url = "data:application/pdf;base64," + base64.b64encode(report.read_bytes()).decode()
    assert read(url).tobytes() == pages[0].tobytes()
    assert read(f"{url}#3").tobytes() == pages[2].tobytes()
    assert len(pdf.expanded(f"{url}#1-2")) == 2


@pytest.mark.parametrize("name", ["r.pdf#0", "r.pdf#3-2", "r.pdf#1-65"])
def test_impossible_pages(name: str) -> None:
    with pytest.raises(ppexport.ImageError, match=r"expected rising ones from 1 on, at most 64"):
        pdf.expanded(name)


def test_a_page_that_is_not_there(report: Path) -> None:
    with pytest.raises(ppexport.ImageError, match=r"report.pdf#4: has 3 pages, found no 4"):
        read(f"{report}#4")
    with pytest.raises(ppexport.ImageError, match=r"none.pdf: no such file"):
        read("none.pdf#2")


def test_documents_that_are_broken(report: Path, tmp_path: Path) -> None:
    pdf_wanted = "cannot be opened .*expected a PDF with pages"
    for name, data, said in (
        ("empty", b"", "is empty"),
        ("text", b"hello", "is not an image that Pillow can read"),
        ("head", report.read_bytes()[:30], pdf_wanted),
        ("noise", b"%PDF-1.4\n" + bytes(500), pdf_wanted),
        ("pages", document([]), pdf_wanted),
    ):
        path = tmp_path / f"{name}.pdf"
        path.write_bytes(data)
        with pytest.raises(ppexport.ImageError, match=rf"{name}.pdf: {said}"):
            read(path)
    key = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O (" + b"o" * 32 + b") /U (" + b"u" * 32 + b") >>"
    locked = tmp_path / "locked.pdf"
    locked.write_bytes(document([content("x")], trailer=key + b" /ID [(a) (a)]"))
    with pytest.raises(
        ppexport.ImageError, match=r"locked.pdf: cannot be opened .*expected one without a password"
    ):
        read(locked)


@pytest.mark.parametrize("size", [(1e6, 1e6), (14400, 3)])
def test_large_pages_are_drawn_smaller(size: tuple[float, float], tmp_path: Path) -> None:
    path = tmp_path / "large.pdf"
    path.write_bytes(document([content("x")], size))
    found = read(path)
    assert found.width * found.height <= pdf.MOST_PIXELS * 1.01


def test_a_page_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = b"\n".join(b"%d 0 0 rg 0 0 m 500 800 l 10 700 l h f" % (i % 2) for i in range(400_000))
    path = tmp_path / "busy.pdf"
    path.write_bytes(document([busy]))
    monkeypatch.setattr(pdf, "SECONDS", 0.5)
    with pytest.raises(ppexport.ImageError, match=r"takes more than 0.5 s to draw"):
        read(path)


def test_a_page_that_takes_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that unpacks to far more than it is; this process takes none of it."""
    line = b"0 0 m 500 800 l 10 700 l h f\n"
    packed = zlib.compress(line * 12_000_000, 1)
    path = tmp_path / "bomb.pdf"
    length = b"/Length %d >>" % len(packed)
    path.write_bytes(document([packed]).replace(b"<< " + length, b"<< /Filter /FlateDecode " + length))
    with pytest.raises(ppexport.ImageError, match="expected a simpler page"):
        read(path)


def test_names_that_only_look_like_pages(report: Path, tmp_path: Path) -> None:
    """What a file holds says what it is, and a file of just that name goes first."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.pdf", "PNG")
    assert read(tmp_path / "picture.pdf").size == (40, 30)
    (tmp_path / "a.pdf#2").write_bytes((tmp_path / "picture.pdf").read_bytes())
    assert read(tmp_path / "a.pdf#2").size == (40, 30)
    with pytest.raises(ppexport.ImageError, match=r"picture.pdf#2: names a page of what is no PDF"):
        read(f"{tmp_path / 'picture.pdf'}#2")
    plain = tmp_path / "report"
    plain.write_bytes(report.read_bytes())
    expected = read(report).tobytes()
    assert read(plain).tobytes() == read(f"file://{report}").tobytes() == expected
    assert read(f"file://{report}#2").tobytes() == read(f"{report}#2").tobytes()
    url = "data:application/octet-stream;base64," + base64.b64encode(report.read_bytes()).decode()
    assert read(url).tobytes() == expected
    with pytest.raises(ppexport.ImageError, match="is a URL, expected a file; nothing is fetched"):
        read("https://example.org/b.pdf#2")


def test_a_picture_never_replaces_the_document(report: Path) -> None:
    before = report.read_bytes()
    done = runner().invoke(main, ["inspect", f"{report}#2", "--overlay", str(report)])
    assert done.exit_code == 1
    assert "is a file that is read" in done.stderr
    assert report.read_bytes() == before


def test_a_thousand_pages(tmp_path: Path) -> None:
    path = tmp_path / "long.pdf"
    path.write_bytes(document([content(str(number)) for number in range(1000)]))
    assert read(f"{path}#1000").size == (1240, 1754)


def test_commands_take_pages(report: Path, pocket_bundle: Path, tmp_path: Path) -> None:
    done = runner().invoke(main, ["inspect", f"{report}#2-3", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [each["image"] for each in found] == [f"{report}#2", f"{report}#3"]
    assert all(each["kept"] < 0.1 * each["tokens"] for each in found)  # margins are the same bytes everywhere
    profiles = str(tmp_path / "profiles.json")
    tasks = [
        {"image": f"report.pdf#{pages}", "question": "What is this?", "answer": "Quito"}
        for pages in ("3", "1-2")
    ]
    report.with_name("own.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    for arguments in (
        [
            "run",
            str(pocket_bundle),
            "-i",
            f"{report}#1-2",
            "What is this?",
            "--max-pixels",
            "200000",
            "-n",
            "4",
        ],
        ["plan", f"{report}#1-2", "--bundle", str(pocket_bundle), "-o", profiles],
        ["eval", str(pocket_bundle), "--workload", str(report.with_name("own.jsonl"))],
    ):
        done = runner().invoke(main, arguments)
        assert done.exit_code == 0, (arguments, done.output, done.stderr)


def test_pages_in_messages(report: Path, pocket_bundle: Path) -> None:
    pipe = ppexport.load(pocket_bundle, max_pixels=200_000)
    pages = [f"{report}#1", f"{report}#2"]
    parts = [{"type": "image", "image": f"{report}#1-2"}, {"type": "text", "text": "What is this?"}]
    expected = pipe.generate("What is this?", pages, max_new_tokens=4)
    for prompt, images in (("What is this?", [f"{report}#1-2"]), ([{"role": "user", "content": parts}], [])):
        found = pipe.generate(prompt, images, max_new_tokens=4)
        assert found.text() == expected.text()
        assert len(found.stats.images) == 2


def test_images_stay_images(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").size == (40, 40)
