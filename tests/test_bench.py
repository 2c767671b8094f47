"""ppexport bench: measuring, result files, reports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from terminal import runner

import ppexport
from ppexport.bench import commands, schema
from ppexport.bench.measure import Plan, measure
from ppexport.bench.power import Meter, rails
from ppexport.bench.schema import METRICS, STAGES, Result
from ppexport.bench.statistics import FEWEST, interval, ratio
from ppexport.bench.workload import BUILT_IN, QUESTION, open_workload
from ppexport.cli import main

POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"


@pytest.fixture(scope="module")
def bundle(pocket_bundle: Path) -> Path:
    return pocket_bundle


@pytest.fixture(scope="module")
def result_file(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the command line, with a second concurrency."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    options = ["--workload", "screens", "--runs", "3", "--warmup", "1", "--cold", "1", "--concurrency", "1,2"]
    done = runner().invoke(main, ["bench", str(bundle), *options, "-q", "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert "tau 0, concurrency 2" in done.stdout
    assert "first token of a new process" in done.stdout
    return path


@pytest.fixture(scope="module")
def result(result_file: Path) -> Result:
    return schema.read(result_file)


def test_a_measurement_holds_what_was_asked(result: Result) -> None:
    assert [s.name for s in result.settings] == [
        "tau 0",
        "unpruned",
        "tau 0, concurrency 2",
        "unpruned, concurrency 2",
    ]
    pruned, full = result.settings[:2]
    assert 0 < pruned.kept < pruned.total == full.kept
    assert pruned.answered == 3 * 8
    assert (pruned.correct or 0) >= 20  # the pocket model knows such screens
    assert result.cold is not None
    assert result.cold.n == 1
    assert 100 < result.cold.mean.value < 30e3  # Python alone takes so long
    assert result.peak_rss_bytes > 50e6
    assert result.energy_joules is None
    assert len(result.speed.memory_gb_per_s) == result.rounds + 1
    assert len(result.pictures) == 8
    assert len(result.settings[2].requests) == 2 * len(pruned.requests)


def test_times_add_up(result: Result) -> None:
    for setting in result.settings[:2]:
        assert set(setting.metrics) == set(METRICS)
        for request in setting.requests:
            assert set(request.stages) == set(STAGES)
            assert sum(request.stages.values()) <= request.e2el
            first = sum(ms for stage, ms in request.stages.items() if stage != "decode")
            assert first <= request.ttft <= request.e2el
            assert len(request.itl) == request.output_tokens - 1
            assert request.ttft + sum(request.itl) <= request.e2el + 1e-6
            assert request.other == pytest.approx(request.e2el - sum(request.stages.values()))
            if request.tpot is not None:
                assert request.tpot >= np.mean(request.itl) - 1e-6
        ttft = setting.metrics["ttft"]
        assert ttft.n == len(setting.requests)
        assert ttft.median.value == pytest.approx(np.median([r.ttft for r in setting.requests]))
        for name in schema.STATISTICS:
            found = getattr(ttft, name)
            assert found.low <= found.value * 1.001
            assert found.high >= found.value * 0.999
        seconds = sum(r.e2el for r in setting.requests) / 1e3
        assert 0 < setting.request_throughput <= len(setting.requests) / seconds * (1 + 1e-6)


def test_settings_take_turns(result: Result) -> None:
    """Every round holds every setting, and not always in the same order."""
    orders = set()
    for number in range(result.rounds):
        first = {s.name: min(r.start for r in s.requests if r.round == number) for s in result.settings}
        orders.add(tuple(sorted(first, key=first.__getitem__)))
    assert len(orders) > 1


def test_answers_that_do_not_end_by_themselves(bundle: Path) -> None:
    name, questions = open_workload("screens", [], None)
    plan = Plan(taus=(0.0,), rounds=1, warmup=0, cold=0, max_new_tokens=12, ignore_eos=True, pictures=False)
    found = measure(str(bundle), name, questions[:2], plan)
    assert [r.output_tokens for r in found.settings[0].requests] == [12, 12]
    assert found.pictures == ()


def test_a_duration_and_a_bundle_without_a_tokenizer(tiny_bundle: Path, golden_bundle: Path) -> None:
    name, questions = open_workload("desktop", [], None)
    for path in (tiny_bundle, golden_bundle):
        plan = Plan(
            taus=(0.0,), duration=0.5, warmup=0, cold=0, max_new_tokens=2, max_pixels=200_000, pictures=False
        )
        found = measure(str(path), name, questions, plan)
        last = found.settings[0].requests[-1]
        assert found.rounds >= FEWEST  # as many as can be compared, however slow the machine
        assert last.start <= 0.5e3 + last.e2el or found.rounds == FEWEST


def test_a_result_is_read_as_it_was_written(result: Result, tmp_path: Path) -> None:
    schema.write(result, tmp_path / "again.json")
    assert schema.read(tmp_path / "again.json") == result
    assert [p.name for p in tmp_path.iterdir()] == ["again.json"]
    (tmp_path / "link.json").symlink_to("real.json")
    schema.write(result, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert schema.read(tmp_path / "real.json") == result


def test_a_device_is_written_to(result: Result) -> None:
    schema.write(result, os.devnull)
    assert not Path(os.devnull).is_file()


def test_a_file_of_the_working_directory_is_not_taken_for_a_module(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the processes of cold starts."""
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "ppexport").mkdir()
    monkeypatch.chdir(tmp_path)
    name, questions = open_workload("screens", [], None)
    plan = Plan(taus=(0.0,), rounds=1, warmup=0, cold=1, max_new_tokens=1, pictures=False)
    assert measure(str(bundle), name, questions[:1], plan).cold is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "cannot be read .*expected a file written by 'ppexport bench'"),
        ("not json", "cannot be read"),
        ({"version": 2}, "found version 2 of bench results, expected 1; upgrade ppexport"),
        ({"version": 0}, "expected 1; measure again"),
        ([1], "found version None"),
        ({"rounds": "many"}, "rounds: .*measure again"),
        ({"extra": 1}, "extra: extra inputs are not permitted"),
        ({"settings": []}, "settings: tuple should have at least 1 item"),
        (
            {"speed": {"memory_gb_per_s": [], "gflop_per_s": [1.0]}},
            "speed.memory_gb_per_s: tuple should have",
        ),
        (
            {"pictures": [{"item": 99, "tau": 0, "webp": ""}]},
            "requests and pictures should be of items 0 to 7",
        ),
    ],
)
def test_other_files_are_refused(change: object, message: str, result_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(result_file.read_text()) | change))
    elif change is not None:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(ppexport.RequestError, match=message):
        schema.read(path)
    done = runner().invoke(main, ["bench", "compare", str(result_file), str(path)])
    assert done.exit_code == 2
    assert str(path) in done.stderr


@pytest.mark.newest
def test_the_published_schema_is_that_of_the_code() -> None:
    published = Path(__file__).parent.parent / "docs" / "bench-result.schema.json"
    assert json.loads(published.read_text(encoding="utf-8")) == Result.model_json_schema()


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_workloads(name: str) -> None:
    assert open_workload(name, [], None)[0] == name
    for question in open_workload(name, [], None)[1]:
        assert question.prompt
        assert not isinstance(question.image, str) or Path(question.image).is_file()
        assert (question.expected is not None) == (name == "screens")


def test_a_folder_says_what_to_ask(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    name, questions = open_workload("documents", [str(tmp_path)], None)
    assert (name, [q.name for q in questions]) == (tmp_path.name, ["a.png", "b.png"])
    assert {q.prompt for q in questions} == {QUESTION}
    rows = [{"image": "b.png", "prompt": "Is it?", "expected": "no"}]
    (tmp_path / "workload.json").write_text(json.dumps(rows))
    (found,) = open_workload("documents", [str(tmp_path)], None)[1]
    assert (found.name, found.prompt, found.expected) == ("b.png", "Is it?", "no")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "found dict, expected a list of questions"),
        ("[]", "expected a list of questions"),
        ('[{"image": "a.png"}]', "entry 0 is .*expected image, prompt"),
        ('[{"image": "a.png", "prompt": 3}]', "entry 0 holds something else than text"),
        ('[{"image": "none.png", "prompt": "?"}]', "entry 0 has the image .none.png., which is no file"),
    ],
)
def test_workload_files_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "workload.json").write_text(text)
    with pytest.raises(ppexport.PpexportError, match=message):
        open_workload("documents", [str(tmp_path)], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", "photos"], "workload is 'photos', expected one of: desktop, documents, screens"),
        (["--workload", "screens", "--prompt", "What?"], "has questions of its own"),
        (["-i", "nothing.png"], "nothing.png: no such file"),
        (["--tau", "2"], "'2', expected 0 to 1 or off, separated by commas"),
        (["--tau", "on"], "'on', expected 0 to 1 or off"),
        (["--concurrency", "0"], "'0', expected 1 to 64"),
        (["--runs", "1", "--duration", "2"], "exclude each other"),
        (["-o", "missing/result.json"], "expected the name of a file in an existing directory"),
    ],
)
def test_measurements_that_cannot_be(options: list[str], message: str, bundle: Path) -> None:
    done = runner().invoke(main, ["bench", str(bundle), *options])
    assert done.exit_code != 0
    assert message in done.stderr


@pytest.mark.parametrize("package", ["pydantic", "psutil", "matplotlib"])
def test_a_missing_package_is_named(package: str, result_file: Path, tmp_path: Path) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from ppexport.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "bench",
        "report",
        str(result_file),
        "-o",
        str(tmp_path / "page.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{package} is not installed" in done.stderr
    assert "pip install 'ppexport[bench]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_intervals_hold_what_they_are_of() -> None:
    """The 95 % interval of a median holds the true one in most of 100 measurements."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(100):
        groups = [rng.lognormal(0, 0.2, 4) for _ in range(20)]
        _, low, high = interval(groups, "median", np.random.default_rng(0))
        inside += low <= 1 <= high
    assert inside >= 88


def test_a_ratio_compares_each_item_with_itself() -> None:
    rng = np.random.default_rng(2)
    base = np.array([1.0, 100.0]) * rng.lognormal(0, 0.01, (24, 2))
    new = np.array([1.1, 110.0]) * rng.lognormal(0, 0.01, (24, 2))
    value, low, high = ratio(base, new, "p50", 0.95, rng)
    assert value == pytest.approx(1.1, rel=0.01)
    assert 1.08 < low < value < high < 1.12
    assert ratio(base[:1], new[:1], "p50", 0.95, rng)[1:] == (0.0, float("inf"))  # nothing to judge by


def test_rails_of_a_jetson(tmp_path: Path) -> None:
    chip = tmp_path / "hwmon3"
    chip.mkdir()
    for name, text in {
        "name": "ina3221\n",
        "in1_label": "VDD_IN\n",
        "in1_input": "5000\n",
        "curr1_input": "2000\n",
        "in7_label": "sum of shunt voltages\n",
        "in7_input": "3\n",
    }.items():
        (chip / name).write_text(text)
    (tmp_path / "hwmon0").mkdir()
    (tmp_path / "hwmon0" / "name").write_text("coretemp\n")
    assert list(rails(tmp_path)) == ["VDD_IN"]
    import time

    begin = time.perf_counter()
    with Meter(tmp_path) as meter:
        time.sleep(0.2)
    seconds = time.perf_counter() - begin
    assert meter.joules is not None
    assert meter.joules["VDD_IN"] == pytest.approx(10 * seconds, rel=0.2)


def test_a_report_stands_alone(result_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = runner().invoke(main, ["bench", "report", str(result_file), str(result_file), "-o", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert "result: unpruned, concurrency 2" in text  # results are told apart by the names of their files
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    assert "<script" not in text
    assert text.count("<svg") == 5
    assert text.count("<img") == 16
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "ids repeat"
    for identifier in ("overview", "stages", "percentiles-1", "percentiles-2", "percentiles-3", "kept"):
        assert f'<table id="{identifier}">' in text
    assert "NaN" not in text


@pytest.mark.parametrize("place", [os.devnull, "link.html"])
def test_a_report_goes_where_it_is_sent(result_file: Path, tmp_path: Path, place: str) -> None:
    """A device is written to, and a link stays one."""
    (tmp_path / "link.html").symlink_to("real.html")
    done = runner().invoke(main, ["bench", "report", str(result_file), "-o", str(tmp_path / place)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").exists() == (place == "link.html")
    assert not list(tmp_path.glob(".*"))


def test_a_report_needs_a_place(result_file: Path) -> None:
    done = runner().invoke(main, ["bench", "report", str(result_file), "-o", "missing/report.html"])
    assert done.exit_code == 1
    assert "missing/report.html: cannot be written" in done.stderr


def test_answers_that_the_context_cuts_are_told(bundle: Path) -> None:
    name, questions = open_workload("screens", [], None)
    plan = Plan(taus=(0.0,), rounds=1, warmup=0, cold=0, max_new_tokens=5000, ignore_eos=True, pictures=False)
    found = measure(str(bundle), name, questions[:1], plan)
    (tokens,) = [r.output_tokens for r in found.settings[0].requests]
    assert tokens < 2048
    told = f"answers have {tokens} tokens, not the 5000 asked for: the context ends there"
    assert told in commands.summary(found)


def test_an_interrupted_measurement_keeps_its_rounds(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "ppexport", "bench", str(bundle), "--workload", "screens", "--cold", "0"]
    command += ["--warmup", "0", "--runs", "100000", "--no-pictures", "-o", str(output)]

    def interruptible() -> (
        None
    ):  # a shell starts background jobs, and so perhaps this test, with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)
    assert process.stderr is not None
    while "measure" not in process.stderr.readline():  # said after the first round
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    found = schema.read(output)
    assert found.rounds >= 1
    assert f"interrupted: the {found.rounds} rounds until then are kept" in err
    for setting in found.settings:
        assert len(setting.requests) == found.rounds * len(found.items)
