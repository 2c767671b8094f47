"""The gate itself: planted slowdowns are found and named, at the noise that was measured, and nothing else is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from terminal import runner

import ppexport
from ppexport.bench import compare as judge
from ppexport.bench import schema
from ppexport.bench.plugin import Latency
from ppexport.bench.schema import STAGES, Bundle, Item, Machine, Options, Request, Result, Setting, Speed
from ppexport.cli import main
from ppexport.runtime.backends.ort import OrtBinding

ROOT = Path(__file__).resolve().parent.parent

NOISE = dict(np.load(GOLDEN / "latency_noise.npz"))  # made by bench/latency_noise.py
RUNS = sum(name.startswith("memory.") for name in NOISE)
ITEMS = NOISE["tau 0.0"].shape[1]
ROUNDS = 240  # of a simulated measurement
PIECE = 40  # rounds that were measured in a row
TOKENS = 16
OPTIONS = Options(
    taus=(0, None),
    concurrency=(1,),
    max_new_tokens=TOKENS,
    ignore_eos=True,
    threads=0,
    min_pixels=1,
    max_pixels=2,
)
MACHINE = Machine(**json.loads(str(NOISE["machine"])))
SETTINGS = {"tau 0": 0.0, "unpruned": None}


def setting(times: np.ndarray, tau: float | None) -> Setting:
    """times [rounds, items, stages] as requests."""
    requests = []
    for number, items in enumerate(times):
        for item, ms in enumerate(items.tolist()):
            first, decode = sum(ms[:-1]), ms[-1]
            requests.append(
                Request.model_construct(
                    round=number,
                    item=item,
                    stages=dict(zip(STAGES, ms, strict=True)),
                    ttft=first,
                    e2el=first + decode,
                    itl=(decode / (TOKENS - 1),) * (TOKENS - 1),
                    output_tokens=TOKENS,
                    answer="",
                )
            )
    return Setting.model_construct(
        tau=tau, concurrency=1, requests=tuple(requests), correct=None, answered=None
    )


def result(settings: Mapping[str, np.ndarray], speed: Speed, **given: Any) -> Result:
    pages = [
        Item(image=str(i), sha256=str(i), width=32, height=32, prompt="", expected=None) for i in range(ITEMS)
    ]
    rest = {
        "workload": "documents",
        "created": "",
        "machine": MACHINE,
        "options": OPTIONS,
        "items": tuple(pages),
    }
    made = tuple(setting(times, SETTINGS[name]) for name, times in settings.items())
    return Result.model_construct(**{**rest, "settings": made, "speed": speed, **given})


def drawn(rng: np.random.Generator, run: int, planted: Mapping[str, float]) -> Result:
    """A measurement like one that was made: pieces of it in any order. ``planted``: stage -> factor."""
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in (*SETTINGS, "memory", "arithmetic")}
    for _ in range(ROUNDS // PIECE):
        first = rng.integers(len(NOISE[f"tau 0.{run}"]) - PIECE)
        for name, found in pieces.items():
            found.append(NOISE[f"{name}.{run}"][first : first + PIECE])
    whole = {name: np.concatenate(found).astype(float) for name, found in pieces.items()}
    for name in SETTINGS:
        for stage, factor in planted.items():
            whole[name][:, :, STAGES.index(stage)] *= factor
    speed = Speed(memory_gb_per_s=tuple(whole.pop("memory")), gflop_per_s=tuple(whole.pop("arithmetic")))
    return result(whole, speed)


def pair(seed: int, planted: Mapping[str, float] | None = None, tolerance: float = 0.05) -> judge.Comparison:
    """Of two measurements that were made at different times."""
    rng = np.random.default_rng(seed)
    base, new = rng.choice(RUNS, size=2, replace=False)
    return judge.compare(drawn(rng, base, {}), drawn(rng, new, planted or {}), tolerance)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_became_a_fifth_slower_is_found_and_named(stage: str) -> None:
    found = 0
    for seed in range(20):
        named = {v.metric.partition(".")[0] for v in pair(seed, {stage: 1.2}).of(judge.REGRESSED)} & set(
            STAGES
        )
        found += named == {stage}
    assert found >= 19


@pytest.mark.slow
def test_no_change_is_no_regression_and_mostly_the_same() -> None:
    assert sum(pair(seed).exit_code == 1 for seed in range(60)) <= 3
    assert sum(pair(seed, tolerance=0.1).exit_code == 0 for seed in range(30)) >= 15


def still(factor: float = 1.0, rounds: int = 24) -> np.ndarray:
    """Times that hardly scatter, with a factor on vision: [rounds, items, stages]."""
    rng = np.random.default_rng(rounds)
    times = np.array([1.0, 1.0, 10.0, 10.0, 20.0]) * rng.lognormal(0, 0.005, (rounds, ITEMS, len(STAGES)))
    times[:, :, STAGES.index("vision")] *= factor
    return times


QUIET = Speed(memory_gb_per_s=(40.0,) * 25, gflop_per_s=(200.0,) * 25)


def judged(new: Result, base: Result | None = None, **options: Any) -> judge.Comparison:
    return judge.compare(base or result({"tau 0": still()}, QUIET), new, **options)


def named(comparison: judge.Comparison, verdict: str) -> set[str]:
    return {v.metric for v in comparison.of(verdict)}


def test_each_verdict_and_exit_code() -> None:
    same = judged(result({"tau 0": still(1.02, 25)}, QUIET))
    assert (same.exit_code, len(same.of(judge.SAME))) == (0, 8)
    slower = judged(result({"tau 0": still(1.25, 25)}, QUIET))  # of the whole, 6 %
    assert (slower.exit_code, named(slower, judge.REGRESSED)) == (1, {"vision.p10", "ttft.p10", "e2el.p10"})
    faster = judged(result({"tau 0": still(0.5, 25)}, QUIET))
    assert (faster.exit_code, named(faster, judge.IMPROVED)) == (0, {"vision.p10", "ttft.p10", "e2el.p10"})
    accepted = judged(result({"tau 0": still(1.2, 25)}, QUIET), tolerance=0.3)
    assert accepted.exit_code == 0
    chosen = judged(result({"tau 0": still(1.2, 25)}, QUIET), metrics=["decode.p50", "e2el.p95", "itl"])
    assert [v.metric for v in chosen.verdicts] == ["decode.p50", "e2el.p95", "itl.p50"]


def test_what_cannot_be_told() -> None:
    for rounds in (1, 5):
        few = judged(result({"tau 0": still(1.2, rounds)}, QUIET))
        assert (few.exit_code, {v.note for v in few.verdicts}) == (
            3,
            {"too few rounds, expected at least 6 in both"},
        )
        assert "Infinity" not in judge.dumps(few)
    gone = judged(result({"unpruned": still()}, QUIET))
    assert {v.note for v in gone.verdicts} == {"not measured now"}
    other = MACHINE.model_copy(update={"cpu": "another"})
    apart = judged(result({"tau 0": still(1.2, 25)}, QUIET, machine=other))
    assert (apart.exit_code, len(apart.of(judge.UNSURE))) == (3, 8)
    assert "another now" in apart.notes[0]
    assert judged(result({"tau 0": still(1.2, 25)}, QUIET, machine=other), any_machine=True).exit_code == 1


def test_a_machine_that_became_slower_is_not_blamed_on_the_bundle() -> None:
    slow = Speed(memory_gb_per_s=(30.0,) * 25, gflop_per_s=(150.0,) * 25)
    found = judged(result({"tau 0": still(1.2, 25)}, slow))
    assert (found.exit_code, found.of(judge.REGRESSED)) == (3, [])
    assert "the machine itself multiplies 33% slower" in " ".join(found.notes)
    assert "vision.p10" in named(judged(result({"tau 0": still(1.8, 25)}, slow)), judge.REGRESSED)


def test_only_questions_with_values_on_both_sides_are_compared() -> None:
    """Of question 1 there is no second token any more: no tpot."""
    base, new = setting(still(), 0.0), setting(still(1, 25), 0.0)
    short = [
        r if r.item != 1 else r.model_copy(update={"output_tokens": 1, "itl": (), "e2el": r.ttft})
        for r in new.requests
    ]
    both = judge.common(base, new.model_copy(update={"requests": tuple(short)}), "tpot")
    assert both is not None
    assert [values.shape for values in both] == [(24, 2), (25, 2)]
    found = judged(
        result({}, QUIET).model_copy(update={"settings": (new.model_copy(update={"requests": short}),)})
    )
    assert "tau 0: 1 answers became longer or shorter" in found.notes[0]
    assert [v.verdict for v in found.verdicts if v.metric == "tpot.p10"] == [judge.SAME]


def test_nothing_to_compare_is_no_success() -> None:
    nothing = np.zeros((24, ITEMS, len(STAGES)))
    new, base = result({"tau 0": nothing}, QUIET), result({"tau 0": nothing}, QUIET)
    assert judged(new, base).exit_code == 3
    named_one = judged(new, base, metrics=["decode.p50"])
    assert (named_one.exit_code, named_one.verdicts[0].note) == (3, "it has no values here")
    more = judged(result({"tau 0": still(1, 25), "unpruned": still()}, QUIET))
    assert (more.exit_code, more.notes) == (0, ("unpruned: not measured then",))


def test_a_small_stage_that_cannot_be_told_does_not_matter() -> None:
    base, new = still(), still(rounds=25)
    for times in (base, new):
        times[:, :, STAGES.index("prune")] = 0.1 * np.random.default_rng(1).lognormal(0, 1, times.shape[:2])
    found = judged(result({"tau 0": new}, QUIET), result({"tau 0": base}, QUIET))
    assert found.exit_code == 0
    (note,) = [v.note for v in found.verdicts if v.metric == "prune.p10"]
    assert re.fullmatch(r"a change of 0\.\d\d ms at most, under 1% of e2el", note)


def shifted(setting: Setting, milliseconds: float) -> Setting:
    """More time outside of all stages, before the first token."""
    longer = [
        r.model_copy(update={"ttft": r.ttft + milliseconds, "e2el": r.e2el + milliseconds})
        for r in setting.requests
    ]
    return setting.model_copy(update={"requests": tuple(longer)})


@pytest.mark.parametrize(("then", "now"), [(0.01, 20.0), (20.0, 0.01)])
def test_time_outside_of_all_stages_is_named_and_no_verdict(then: float, now: float) -> None:
    """Twenty milliseconds of forty that no stage took: they belong to the machine as much as to the bundle."""
    base, new = (
        result({}, QUIET).model_copy(update={"settings": (shifted(setting(still(1, 24 + i), 0.0), ms),)})
        for i, ms in enumerate((then, now))
    )
    found = judged(new, base)
    assert (found.exit_code, found.of(judge.REGRESSED), found.of(judge.IMPROVED)) == (
        judge.CANNOT_TELL,
        [],
        [],
    )
    assert named(found, judge.UNSURE) == {"ttft.p10", "e2el.p10", "other.p10"}
    assert {v.note for v in found.of(judge.UNSURE)} == {"only the time outside of all stages (other) says so"}


def test_an_improvement_within_the_tolerance_is_not_the_same() -> None:
    """-11 .. -7 % at 10 % is neither an improvement by 10 % nor a change of at most 10 %."""
    new = still(0.91, 25)
    new[:, :, STAGES.index("vision")] *= np.random.default_rng(2).lognormal(0, 0.02, new[:, :, 0].shape)
    found = judged(result({"tau 0": new}, QUIET), tolerance=0.1)
    (vision,) = [v for v in found.verdicts if v.metric == "vision.p10"]
    assert vision.low is not None
    assert vision.high is not None
    assert vision.low < 1 / 1.1 < vision.high < 1
    assert (vision.verdict, found.exit_code) == (judge.UNSURE, judge.CANNOT_TELL)


def with_answers(*said: str) -> Result:
    """One answer to each of the questions, whose right answers are a, b, c."""
    made = setting(still(), 0.0)
    requests = tuple(r.model_copy(update={"answer": said[r.item]}) for r in made.requests)
    known = result({}, QUIET)
    items = tuple(i.model_copy(update={"expected": e}) for i, e in zip(known.items, "abc", strict=True))
    return known.model_copy(
        update={"settings": (made.model_copy(update={"requests": requests}),), "items": items}
    )


@pytest.mark.parametrize(
    ("before", "after", "verdict", "note"),
    [
        ("abc", "abc", judge.SAME, ""),
        ("abx", "abx", judge.SAME, ""),
        ("abc", "xbc", judge.REGRESSED, "lost: 0"),
        ("xbc", "axc", judge.REGRESSED, "lost: 1"),  # another one was won
        ("xbc", "abc", judge.IMPROVED, ""),
    ],
)
def test_a_fast_wrong_answer_is_a_regression(before: str, after: str, verdict: str, note: str) -> None:
    found = judged(with_answers(*after), with_answers(*before), accuracy=True)
    assert [(v.verdict, v.note) for v in found.verdicts if v.metric == "accuracy"] == [(verdict, note)]
    assert judged(with_answers(*after), with_answers(*before)).exit_code == 0


def test_answers_without_a_right_one() -> None:
    found = judged(result({"tau 0": still(1, 25)}, QUIET), accuracy=True)
    assert "no expected answers; 0 of 3 answers changed" in [v.note for v in found.verdicts]
    assert found.exit_code == 3


def test_other_questions_and_options_are_no_comparison() -> None:
    new = result({"tau 0": still()}, QUIET)
    page = new.items[0].model_copy(update={"prompt": "Why?"})
    with pytest.raises(ppexport.RequestError, match="are of different questions: 3 of 'documents' and 1"):
        judged(new.model_copy(update={"items": (page,)}))
    with pytest.raises(ppexport.RequestError, match="max_new_tokens was 16 and is 8, expected the same"):
        judged(new.model_copy(update={"options": OPTIONS.model_copy(update={"max_new_tokens": 8})}))
    with pytest.raises(ppexport.RequestError, match="metric is 'speed', expected one of ttft, tpot"):
        judged(new, metrics=["speed"])


def test_a_summary_for_github() -> None:
    new = result({"tau 0": still(1.25, 25)}, QUIET, bundle=Bundle.model_construct(name="my|bundle"))
    lines = judge.markdown(judged(new), "Latency of my|bundle", "one machine").splitlines()
    assert lines[0] == "### Latency of my|bundle: 3 regressed, 5 same (tolerance 5%)"
    assert len([line for line in lines if line.startswith("| tau 0 |")]) == 8
    assert any("vision.p10" in line and "🔴 regressed" in line for line in lines)


@pytest.fixture(scope="module")
def bundle(pocket_bundle: Path) -> Path:
    return pocket_bundle


@pytest.mark.slow
def test_a_sleep_in_the_vision_session_is_found(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, on the real thing."""

    def run(name: str) -> str:
        options = [
            "--workload",
            "screens",
            "--tau",
            "0",
            "--runs",
            "14",
            "--cold",
            "0",
            "--no-pictures",
            "-q",
        ]
        done = runner().invoke(main, ["bench", str(bundle), *options, "-o", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        return str(tmp_path / name)

    base, run_graph = run("base.json"), OrtBinding.run

    def slowly(binding: OrtBinding) -> None:
        if "keep" in binding._bound:  # an input of the vision graph alone
            time.sleep(0.03)
        run_graph(binding)

    monkeypatch.setattr(OrtBinding, "run", slowly)
    done = runner().invoke(main, ["bench", "compare", base, run("new.json"), "--json", "--accuracy"])
    assert done.exit_code == 1, done.output
    verdicts = {v["metric"]: v for v in json.loads(done.stdout)["verdicts"]}
    print(done.stdout)
    assert verdicts["vision.p10"]["verdict"] == judge.REGRESSED
    assert verdicts["accuracy"]["verdict"] == judge.SAME
    # what comes after a sleep may be slower, too: the processor has gone to sleep as well
    stages = {stage: verdicts[f"{stage}.p10"]["ratio"] for stage in STAGES if f"{stage}.p10" in verdicts}
    assert max(stages, key=stages.__getitem__) == "vision"


PLANTED = """
import time
from ppexport.runtime.vision import Vision
encode = Vision.encode
Vision.encode = lambda *args: (time.sleep(0.05), encode(*args))[1]
"""


def slower(baseline: schema.Result, factor: float) -> schema.Result:
    """The same measurement on a machine that needs so many times as long."""

    def slow(request: schema.Request) -> schema.Request:
        return request.model_copy(
            update={
                "stages": {stage: factor * ms for stage, ms in request.stages.items()},
                "ttft": factor * request.ttft,
                "e2el": factor * request.e2el,
                "itl": tuple(factor * ms for ms in request.itl),
            }
        )

    settings = (
        each.model_copy(update={"requests": tuple(map(slow, each.requests))}) for each in baseline.settings
    )
    return baseline.model_copy(update={"settings": tuple(settings)})


def test_the_example_holds_a_bundle_to_its_promise(bundle: Path, tmp_path: Path) -> None:
    project = tmp_path / "latency_gate"
    shutil.copytree(ROOT / "examples" / "latency_gate", project)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "BUNDLE": str(bundle), "LATENCY_SECONDS": "1", "PYTEST_ADDOPTS": ""}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--rootdir",
            ".",
            "-rs",
            "-p",
            "no:cacheprovider",
            *options,
        ]
        return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)

    first = run()
    assert first.returncode == 1
    assert "there is no such baseline; write it with: pytest --latency-update" in first.stdout
    assert run("--latency-update").returncode == 0
    baseline = schema.read(project / "latency" / "cpu.json")
    assert [item.image for item in baseline.items] == ["read-0.png", "yesno-1.png", "read-2.png"]
    assert baseline.settings[0].correct == baseline.settings[0].answered
    measured = (project / "latency" / "cpu.json").read_text()
    (project / "latency" / "cpu.json").write_text(slower(baseline, 10).model_dump_json())
    again = run()  # against a promise ten times as slow: a busy machine keeps it, too
    assert again.returncode == 0, again.stdout
    (project / "latency" / "cpu.json").write_text(measured)
    (project / "conftest.py").write_text(PLANTED)
    slow = run()
    assert slow.returncode == 1, slow.stdout
    assert any("vision.p10" in line and "regressed" in line for line in slow.stdout.splitlines())


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [([1, 1, 1], "failed"), ([1, 1, 2], "skipped"), ([2, 2, 1], "skipped"), ([2, 1, 0], "passed")],
)
def test_attempts(codes: list[int], outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression has to show each time; one good measurement is enough."""
    verdict = {0: judge.SAME, 1: judge.REGRESSED, 2: judge.UNSURE}
    told = [judge.Verdict("tau 0", "ttft.p10", 1, 1, 1, 1, 1, verdict[code]) for code in codes]
    comparisons = iter([judge.Comparison(0.05, (each,), ()) for each in told])
    (tmp_path / "base.json").write_text("{}")
    monkeypatch.setattr(schema, "read", lambda path: result({"tau 0": still()}, QUIET))
    monkeypatch.setattr("ppexport.bench.machine.describe", lambda: MACHINE)
    monkeypatch.setattr("ppexport.bench.measure.measure", lambda *_: None)
    monkeypatch.setattr(judge, "compare", lambda *_: next(comparisons))
    gate = Latency(tmp_path, update=False)
    if outcome == "passed":
        assert gate.check("bundle", "desktop", "base.json") is not None
    else:
        with pytest.raises(pytest.fail.Exception if outcome == "failed" else pytest.skip.Exception):
            gate.check("bundle", "desktop", "base.json")


def test_checks_that_cannot_be(tmp_path: Path) -> None:
    gate = Latency(tmp_path, update=False)
    with pytest.raises(
        pytest.fail.Exception, match="tolerance is 'much', expected a share such as 5% or 0.05"
    ):
        gate.check("bundle", "desktop", "base.json", tolerance="much")
    with pytest.raises(pytest.fail.Exception, match="photos: no such file"):
        gate.check("bundle", "photos", "base.json")
    with pytest.raises(pytest.fail.Exception, match="bundle: "):
        Latency(tmp_path, update=True).check("bundle", "desktop", "base.json")
