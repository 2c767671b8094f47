"""The command line: output, exit codes, laziness, interruption."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import IMAGES, usual_and_slow
from terminal import runner

import ppexport
from ppexport.cli import main

SCREEN = IMAGES / "web_gnuplot.png"


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = runner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_run_answers_with_statistics(tiny_bundle: Path, tmp_path: Path) -> None:
    code, out, err = invoke(
        "run", tiny_bundle, "-i", SCREEN, "Title?", "-n", 4, "--overlay", tmp_path / "o.png"
    )
    assert code == 0
    assert out.endswith("\n")
    assert "kept 198 of 768 tokens, 25.8%" in err
    assert "answer 4, length" in err
    assert "vision" in err
    assert (tmp_path / "o.png").exists()


def test_run_json_and_no_prune(tiny_bundle: Path) -> None:
    code, out, _ = invoke("run", tiny_bundle, "-i", SCREEN, "Title?", "-n", 3, "--json", "--no-prune")
    assert code == 0
    found = json.loads(out)
    assert found["images"] == [
        {
            "view": 0,
            "width": 1024,
            "height": 768,
            "tokens": 768,
            "kept": 768,
            "reason": "pruning is off",
            "dropped": [],
        }
    ]
    assert found["generated_tokens"] == 3
    assert set(found["milliseconds"]) == {"image", "prune", "reuse", "text", "vision", "prefill", "decode"}


def test_run_takes_the_bundle_s_pruning_and_its_own_seed(tiny_bundle: Path) -> None:
    """Without an option of pruning the bundle decides; --seed is that of the sampling."""
    options = ("run", tiny_bundle, "-i", SCREEN, "Title?", "-n", 8, "--json")
    plain = json.loads(invoke(*options)[1])
    assert plain["images"][0]["kept"] == 198
    drawn = [
        json.loads(invoke(*options, "--temperature", 5, "--seed", seed)[1])["answer"] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_errors_are_one_line_and_exit_code_1(tiny_bundle: Path, tmp_path: Path) -> None:
    code, out, err = invoke("run", tiny_bundle, "-i", tmp_path / "none.png", "hi")
    assert (code, out) == (1, "")
    assert err == f"Error: {tmp_path / 'none.png'}: no such file\n"


def test_overlay_never_harms_a_file(tiny_bundle: Path, tmp_path: Path) -> None:
    notes, picture = tmp_path / "notes.txt", tmp_path / "in.png"
    notes.write_text("precious")
    picture.write_bytes(SCREEN.read_bytes())
    for target, message in (
        (notes, "expected a name that ends in .png"),
        (tmp_path, "expected a name that ends in"),
        (tmp_path / "no" / "o.png", "expected a file in an existing directory"),
        (picture, "is a file that is read"),
    ):
        for command in (["inspect", picture], ["run", tiny_bundle, "hi", "-i", picture]):
            code, out, err = invoke(*command, "--overlay", target)
            assert (code, out) == (1, "")
            assert message in err
    assert notes.read_text() == "precious"
    assert picture.read_bytes() == SCREEN.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.png", "notes.txt"]


@pytest.mark.parametrize(
    "command",
    [
        "run {bundle} hi -i {picture} --trace {picture}",
        "run {bundle} hi --schema {schema} --trace {schema}",
        "run {bundle} hi --trace {bundle}/bundle.json",
        "bench {bundle} -i {picture} --runs 1 --cold 0 -q -o {picture}",
        "bench {bundle} -i {folder} --runs 1 --cold 0 -q -o {picture}",
        "bench {bundle} --runs 1 --cold 0 -q -o {bundle}/vision.onnx",
        "bench report {schema} -o {schema}",
        "bench compare {schema} {picture} --markdown {schema}",
        "bench serve http://127.0.0.1:1 -i {picture} -o {picture}",
    ],
)
def test_no_output_replaces_what_is_read(tiny_bundle: Path, tmp_path: Path, command: str) -> None:
    picture, schema = tmp_path / "pictures" / "in.png", tmp_path / "schema.json"
    picture.parent.mkdir()
    picture.write_bytes(SCREEN.read_bytes())
    schema.write_text("{}")
    read = [picture, schema, tiny_bundle / "bundle.json", tiny_bundle / "vision.onnx"]
    before = [file.read_bytes() for file in read]
    names = {"bundle": tiny_bundle, "picture": picture, "folder": picture.parent, "schema": schema}
    code, _, err = invoke(*command.format(**names).split())
    assert code == (2 if "compare" in command else 1)
    assert "that is read, expected another name" in err
    assert [file.read_bytes() for file in read] == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-prune", "--tau", "0.1"],
        ["--overlay", "x.png"],
        ["--tau", "2"],
        ["--threads", "-1"],
        ["-n", "0"],
    ],
)
def test_usage_errors_exit_with_2(tiny_bundle: Path, arguments: list[str]) -> None:
    assert invoke("run", tiny_bundle, "hi", *arguments)[0] == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("verify {bundle} {bundle} --cosine nan", "nan is no finite number"),
        ("verify {bundle} {bundle} --agreement 2", "2.0 is not in the range 0<=x<=1"),
        ("serve {bundle} --allow-remote http://x/", "'http://x/' is no name of a host"),
        ("eval {bundle} --skills=", "skill is '', expected one of"),
        ("eval {bundle} --workload {questions}", "questions.jsonl:2: the question is empty, expected a text"),
        pytest.param(
            "build {bundle} -o {new}", "is a bundle, expected a checkpoint", marks=pytest.mark.newest
        ),
    ],
)
def test_what_cannot_be_is_said_at_once(
    tiny_bundle: Path, tmp_path: Path, command: str, message: str
) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [{"image": str(SCREEN), "question": question, "answer": "Porto"} for question in ("Where?", " ")]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    filled = command.format(bundle=tiny_bundle, questions=questions, new=tmp_path / "new")
    code, out, err = invoke(*filled.split())
    assert code in (1, 2)
    assert out == ""
    assert message in err


HEAVY = (
    "numpy",
    "PIL",
    "rich",
    "tokenizers",
    "jinja2",
    "onnxruntime",
    "torch",
    "onnx",
    "transformers",
    "importlib.metadata",
)


@pytest.mark.parametrize("command", [[], ["build"], ["run"], ["inspect"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom ppexport.cli import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit as e: assert e.code == 0\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0].startswith("Usage:")
    assert out.splitlines()[-1] == "[]"


def test_every_command_and_option_has_help() -> None:
    for name, command in main.commands.items():
        assert command.help, name
        for parameter in command.params:
            if getattr(parameter, "opts", [""])[0].startswith("-") and parameter.name != "help":
                assert getattr(parameter, "help", None), f"{name} {parameter.opts}"


@pytest.mark.newest
@pytest.mark.parametrize("sent", usual_and_slow([signal.SIGINT], [signal.SIGTERM, signal.SIGHUP]))
def test_interrupted_build_leaves_nothing_and_the_next_works(
    tiny_checkpoint: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    output = tmp_path / "new" / "bundle"
    command = [sys.executable, "-m", "ppexport.cli", "build", str(tiny_checkpoint), "-o", str(output)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}

    def interruptible() -> (
        None
    ):  # a shell starts background jobs, and so perhaps this test, with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=interruptible
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("new/.bundle.*.partial")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert "Aborted!" in err
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run([*command, "-q"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert ppexport.load(output).manifest.family == "qwen3_vl"


@pytest.mark.newest
def test_build_says_what_it_will_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (checkpoint / name).unlink()
    generation = {"eos_token_id": 1, "do_sample": True}
    (checkpoint / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    code, out, err = invoke("build", checkpoint, "-o", tmp_path / "b")
    assert code == 0
    assert out == f"built {tmp_path / 'b'}\n"
    said = " ".join(err.split())
    assert "MB of disk and" in said
    assert "no tokenizer.json: the bundle takes token ids only" in said
    assert "using the family's 65536 to 16777216 pixels" in said
    assert "generation_config.json asks for sampling" in said
    for stage in ("trace", "vision weights", "language weights", "hash bundle", "hash checkpoint"):
        assert stage in said


ESTIMATE = """
import re, sys
from pathlib import Path
from ppexport.build_bundle import build
plans = []
output = build(sys.argv[1], sys.argv[2], sys.argv[3], on_plan=lambda plan, sizes: plans.append(plan))
used = sum(file.stat().st_size for file in Path(output).iterdir())
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(plans[0].disk / used, plans[0].ram / peak)
"""


@pytest.mark.slow
@pytest.mark.newest
def test_estimates_are_near_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which traces itself; the same at the 300M and 2B shapes is in bench/build.py."""
    monkeypatch.delenv("PYTHONPATH")
    pocket = Path(__file__).parent.parent / "models" / "pocket"
    command = [sys.executable, "-c", ESTIMATE, str(pocket), str(tmp_path / "out"), "int4"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    disk, memory = map(float, out.split())
    assert 1 <= disk < 1.5
    assert 1 <= memory < 1.5


def test_a_full_disk_is_told_whatever_is_written() -> None:
    for arguments in (["--help"], ["run", "--help"], ["inspect", str(SCREEN)]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "ppexport", *arguments]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith(
            "Error: the output cannot be written: [Errno 28] No space left on device\n"
        )
        assert "Traceback" not in done.stderr


@pytest.mark.newest
def test_names_and_questions_beyond_ascii_in_any_locale(tmp_path: Path) -> None:
    """Where Python takes the system for ASCII, as in minimal containers; from the build to the picture."""
    folder = tmp_path / "bündel 漢"
    folder.mkdir()
    shutil.copytree(Path(__file__).parent.parent / "models" / "pocket", folder / "mödel")
    shutil.copy(SCREEN, folder / "ü.png")
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ppexport", *map(str, arguments)]
        return subprocess.run(command, env=ascii_only, capture_output=True, text=True, encoding="utf-8")

    built = run("build", folder / "mödel", "-o", folder / "b")
    assert built.returncode == 0, built.stderr
    files = ("-i", folder / "ü.png", "--overlay", folder / "ö.png", "--trace", folder / "ß.json")
    asked = run("run", folder / "b", *files, "-n", 3, "--json", "Wo ist 漢?")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["generated_tokens"] >= 1
    assert {"ö.png", "ß.json"} <= {path.name for path in folder.iterdir()}
    missing = run("inspect", folder / "fehlt é.png")
    assert missing.returncode == 1
    assert re.fullmatch(r"Error: .*/fehlt .*\.png: no such file\n", missing.stderr)


def test_swapped_arguments_and_options_of_logs_after_the_command(tiny_bundle: Path) -> None:
    code, _, err = invoke("run", "What is this?", tiny_bundle)
    assert (code, err) == (
        1,
        f"Error: found 'What is this?' first and the bundle '{tiny_bundle}' after it, expected BUNDLE PROMPT\n",
    )
    code, _, err = invoke("run", "/no/bundle", "why? " * 1000)
    assert (code, err) == (
        1,
        "Error: /no/bundle: no such directory; expected a bundle made by 'ppexport build'\n",
    )
    for arguments in (
        ["--log-format", "json", "run", tiny_bundle],
        ["run", tiny_bundle, "--log-format", "json"],
    ):
        command = [sys.executable, "-m", "ppexport", *map(str, arguments), "-q", "-n", "3", "hi"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = done.stdout.splitlines()
        events = [json.loads(line)["event"] for line in lines if line.startswith('{"time"')]
        assert events == [
            "loaded",
            "request",
        ]  # each on a line of its own, also where an answer was being written
    assert "--log-level" in invoke("bench", "compare", "--help")[1]


def test_targets_are_checked_before_the_work(tiny_bundle: Path, tmp_path: Path) -> None:
    for option, target in (
        ("--trace", tmp_path),
        ("--overlay", tmp_path / "no" / "o.png"),
        ("--trace", "/proc/t.json"),
    ):
        code, out, err = invoke("run", tiny_bundle, "-i", SCREEN, "hi", option, target)
        assert (code, out) == (1, "")
        assert "written" in err


@pytest.mark.newest
def test_building_from_python(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = ppexport.build(tiny_checkpoint, tmp_path / "bundle", precision="int4")
    assert str(ppexport.load(bundle).manifest.precision).startswith("int4")
    assert "build" in dir(ppexport)
