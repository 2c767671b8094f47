"""``ppexport batch``: a file of requests, answered once each, in order, also after it was cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from serving import asked
from terminal import runner

import ppexport
from ppexport.cli import main

pytest.importorskip("pydantic", reason="pydantic is not installed")
SCREEN = Path(__file__).parent.parent / "docs" / "settings.png"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, bodies: list[Any]) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in bodies))
    return path


def test_answers_are_in_order_and_bad_lines_apart(pocket_bundle: Path, tmp_path: Path) -> None:
    bodies: list[Any] = [
        {"messages": asked("Transcribe all text.", SCREEN), "max_tokens": 60},
        {
            "custom_id": "b",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": asked("Hi")},
        },
        "{not json",
        {"messages": asked("What is the Region?", SCREEN)},
        {"messages": asked("What is the Region?", SCREEN), "n": 3},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
        {"messages": asked("What is the Region?", SCREEN), "stop": ["or"], "logprobs": True},
    ]
    source = written(tmp_path / "in.jsonl", bodies)
    output = tmp_path / "out.jsonl"
    done = runner().invoke(main, ["batch", str(pocket_bundle), str(source), "-o", str(output), "-q"])
    assert done.exit_code == 1
    assert done.stdout == f"4 answered in {output}\n"
    assert "3 could not be answered" in done.stderr
    found = lines(output)
    assert [each["line"] for each in found] == [1, 2, 4, 7]
    assert found[1]["custom_id"] == "b"
    said = [each["response"]["choices"][0]["message"]["content"] for each in found]
    assert (said[2], said[3]) == ("Porto", "P")
    assert found[3]["response"]["choices"][0]["logprobs"]["content"]
    pipe = ppexport.load(pocket_bundle)
    assert said[0] == pipe.generate("Transcribe all text.", [SCREEN], max_new_tokens=60).text()
    errors = lines(tmp_path / "out.errors.jsonl")
    assert [(each["line"], each["status"]) for each in errors] == [(3, 400), (5, 400), (6, 400)]
    assert "n is 3" in errors[1]["error"]["message"]
    again = runner().invoke(main, ["batch", str(pocket_bundle), str(source), "-o", str(output), "-q"])
    assert (again.exit_code, again.stdout) == (1, f"0 answered in {output}\n")
    assert lines(output) == found


def test_it_goes_on_where_it_was_killed(pocket_bundle: Path, tmp_path: Path) -> None:
    """Every line is answered once, and the last one that was written in part is written again."""
    bodies: list[Any] = []
    for i in range(60):
        bodies.append({"messages": asked(f"Question {i}?", SCREEN), "max_tokens": 20} if i % 10 else "bad")
    source = written(tmp_path / "in.jsonl", bodies)
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "ppexport",
        "batch",
        str(pocket_bundle),
        str(source),
        "-o",
        str(output),
        "-q",
    ]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b"\n") < 10:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes().count(b"\n")
    with output.open("ab") as file:
        file.write(b'{"line": 99, "resp')
    assert before < 54
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert sorted(each["line"] for each in lines(output)) == [i + 1 for i in range(60) if i % 10]
    assert [each["line"] for each in lines(tmp_path / "out.errors.jsonl")] == [
        i + 1 for i in range(0, 60, 10)
    ]


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("none.jsonl", "out.jsonl", "none.jsonl: cannot be read"),
        ("in.jsonl", "in.jsonl", "is the file of requests"),
        ("in.jsonl", "nowhere/out.jsonl", "expected the name of a file in an existing directory"),
        ("in.jsonl", "other.txt", "exists and is not of 'ppexport batch'"),
    ],
)
def test_files_that_do_not_fit(
    pocket_bundle: Path, tmp_path: Path, source: str, output: str, message: str
) -> None:
    written(tmp_path / "in.jsonl", [{"messages": asked("Hi"), "max_tokens": 2}])
    (tmp_path / "other.txt").write_text("my notes\n")
    arguments = ["batch", str(pocket_bundle), str(tmp_path / source), "-o", str(tmp_path / output), "-q"]
    done = runner().invoke(main, arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert (tmp_path / "other.txt").read_text() == "my notes\n"


def test_an_output_of_another_file(pocket_bundle: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [{"messages": asked("Hi"), "max_tokens": 2}] * 3)
    output = tmp_path / "out.jsonl"
    arguments = ["batch", str(pocket_bundle), str(source), "-o", str(output), "-q"]
    assert runner().invoke(main, arguments).exit_code == 0
    written(source, [{"messages": asked("Hi"), "max_tokens": 2}])
    done = runner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "holds line 3, but" in done.stderr


@pytest.mark.parametrize("text", ["notes without a newline", '{"my": "json"}', '{"line": "x"}\n', "notes\n"])
def test_a_file_of_something_else_stays_as_it_is(text: str, pocket_bundle: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [{"messages": asked("Hi"), "max_tokens": 2}])
    for name in ("out.jsonl", "out.errors.jsonl"):
        (tmp_path / name).write_text(text)
        done = runner().invoke(
            main, ["batch", str(pocket_bundle), str(source), "-o", str(tmp_path / "out.jsonl")]
        )
        assert done.exit_code == 1
        assert "is not of 'ppexport batch'" in done.stderr
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).unlink()


def test_blank_lines_and_a_lost_file_of_errors(pocket_bundle: Path, tmp_path: Path) -> None:
    """Numbers are those of the lines; what was taken away is not asked again behind later ones."""
    body = json.dumps({"messages": asked("Hi"), "max_tokens": 2})
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{body}\n\n{{bad\n{body}\n \n")
    arguments = ["batch", str(pocket_bundle), str(source), "-o", str(output), "-q"]
    assert runner().invoke(main, arguments).exit_code == 1
    assert [each["line"] for each in lines(output)] == [1, 4]
    before = output.read_text()
    done = runner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (1, f"0 answered in {output}\n")
    (tmp_path / "out.errors.jsonl").unlink()
    done = runner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "lacks line 3 of" in done.stderr
    assert output.read_text() == before


def test_a_line_that_is_too_long(
    pocket_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppexport.batch.LONGEST_LINE", 200)
    body = {"messages": asked("Hi"), "max_tokens": 2}
    source = written(tmp_path / "in.jsonl", [body, {**body, "user": "x" * 1000}, body])
    output = tmp_path / "out.jsonl"
    assert runner().invoke(main, ["batch", str(pocket_bundle), str(source), "-o", str(output)]).exit_code == 1
    assert [each["line"] for each in lines(output)] == [1, 3]


@pytest.mark.parametrize("place", ["/dev/null", "/dev/zero", "pipe"])
def test_answers_go_to_a_file(pocket_bundle: Path, tmp_path: Path, place: str) -> None:
    """Not to what has no end, and waits for nobody."""
    source = written(tmp_path / "in.jsonl", [{"messages": asked("Hi"), "max_tokens": 2}])
    if place == "pipe":
        os.mkfifo(tmp_path / place)
    target = tmp_path / place  # an absolute place stays what it is
    done = runner().invoke(main, ["batch", str(pocket_bundle), str(source), "-o", str(target), "-q"])
    assert done.exit_code == 1
    assert f"{target}: is no regular file" in done.stderr
