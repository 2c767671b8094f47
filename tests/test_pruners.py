"""A further pruner is settings and a graph (every_second.py); the pipeline runs lists of them, around vision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import every_second
import numpy as np
import pytest
from every_second import EverySecond, EverySecondFeature
from terminal import runner

import ppexport
from ppexport.build_bundle import build
from ppexport.cli import main
from ppexport.exporters.pruners import GRAPHS
from ppexport.models.errors import BundleError, RequestError
from ppexport.models.pruners import PRUNERS
from ppexport.models.pruners.pixelprune import PixelPrune
from ppexport.verify import verify

POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"
SCREEN = Path(__file__).resolve().parent.parent / "docs" / "settings.png"
QUESTION = "What is the Region?"


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for pruner, graphs in (
            (EverySecond, every_second.graphs),
            (EverySecondFeature, every_second.feature_graphs),
        ):
            patch.setitem(PRUNERS, pruner.name, pruner)
            patch.setitem(GRAPHS, pruner.name, graphs)
        yield


@pytest.fixture(scope="module", params=["ort", "plain"])
def pipe(
    request: pytest.FixtureRequest, registered: None, tmp_path_factory: pytest.TempPathFactory
) -> ppexport.Pipeline:
    return ppexport.load(
        build(
            POCKET, tmp_path_factory.mktemp(request.param) / "bundle", precision="fp32", dialect=request.param
        )
    )


def test_before_vision(pipe: ppexport.Pipeline) -> None:
    full = pipe.encode(SCREEN, None)
    half = pipe.encode(SCREEN, EverySecond())
    assert half.keep.tolist() == list(range(0, full.selection.total, 2))
    assert half.features.shape[1] == len(half.keep)
    assert half.selection.others == (EverySecond(),)
    other = pipe.encode(SCREEN, [EverySecond(1)])
    assert other.keep.tolist() == [0, *range(1, full.selection.total, 2)]  # a prompt needs the first one


def test_after_vision(pipe: ppexport.Pipeline) -> None:
    """Features are those of the whole image, every second of them; positions and reuse follow what is left."""
    full = pipe.encode(SCREEN, None)
    half = pipe.encode(SCREEN, EverySecondFeature(1))
    assert half.keep.tolist() == list(range(1, full.selection.total, 2))
    np.testing.assert_array_equal(half.features, full.features[:, 1::2])


def test_a_list_of_pruners(pipe: ppexport.Pipeline) -> None:
    pixel = pipe.encode(SCREEN, PixelPrune())
    both = pipe.encode(SCREEN, [PixelPrune(), EverySecond()])
    assert both.keep.tolist() == [i for i in pixel.keep.tolist() if i % 2 == 0]
    later = pipe.encode(SCREEN, [PixelPrune(), EverySecondFeature()])
    assert later.keep.tolist() == pixel.keep.tolist()[::2]
    np.testing.assert_array_equal(later.features, pixel.features[:, ::2])


def test_answers_and_reuse(pipe: ppexport.Pipeline) -> None:
    """The prompt holds what the last pruner left; the same request finds it again, one pruned otherwise does not."""
    pruners = [PixelPrune(), EverySecondFeature()]
    first = pipe.generate(QUESTION, SCREEN, pruners, max_new_tokens=4)
    said = first.text()
    kept = first.stats.kept
    assert first.stats.prompt_tokens_full - first.stats.prompt_tokens == first.stats.total - kept
    again = pipe.generate(QUESTION, SCREEN, pruners, max_new_tokens=4)
    assert again.text() == said
    assert again.stats.reused_tokens == first.stats.prompt_tokens - 1
    shifted = pipe.generate(QUESTION, SCREEN, [PixelPrune(), EverySecondFeature(1)], max_new_tokens=4)
    shifted.text()
    assert shifted.stats.reused_tokens < kept
    together = pipe.generate_batch([ppexport.Request(QUESTION, SCREEN, pruners, 4)] * 2)
    assert [answer.text() for answer in together] == [said, said]


def test_a_bundle_carries_its_pruners(registered: None, tmp_path: Path) -> None:
    path = build(POCKET, tmp_path / "bundle", prune=[PixelPrune(tau=0.02), EverySecondFeature(1)])
    pipe = ppexport.load(path)
    assert pipe.prune == (PixelPrune(tau=0.02), EverySecondFeature(1))
    assert pipe.encode(SCREEN).keep.tolist() == pipe.encode(SCREEN, PixelPrune(tau=0.02)).keep.tolist()[1::2]
    text = json.loads((path / "bundle.json").read_text())
    assert text["prune"][1] == {"pruner": "every_second_feature", "settings": {"first": 1}}
    for change, message in (
        ({"pruner": "no_such"}, "prune: found the pruner 'no_such', expected one of: "),
        ({"settings": {"second": 1}}, "prune: every_second_feature: .*second"),
    ):
        changed = {**text, "prune": [{**text["prune"][1], **change}]}
        (path / "bundle.json").write_text(json.dumps(changed))
        with pytest.raises(BundleError, match=message):
            ppexport.load(path)


def test_what_engines_do_not_run(registered: None, tmp_path: Path) -> None:
    pruners = [PixelPrune(), EverySecond()]
    with pytest.raises(
        RequestError, match="prunes images with pixelprune, every_second, expected pixelprune alone"
    ):
        build(POCKET, tmp_path / "engines", targets=["tensorrt-rtx"], prune=pruners)
    assert not (tmp_path / "engines").exists()


def test_verify_prunes_as_the_bundle_does(registered: None, tmp_path: Path) -> None:
    """Features of what the tower saw; logits after what the last pruner left."""
    path = build(POCKET, tmp_path / "bundle", "fp32", prune=[PixelPrune(), EverySecondFeature()])
    report = verify(path, POCKET, [str(SCREEN)], tokens=6)
    assert report.agreement == 1.0
    assert report.embeds is not None
    assert report.embeds.error < 1e-4
    assert report.logits.error < 1e-4


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (
            0.5,
            r"prune is 0\.5, expected ppexport\.PixelPrune\(\.\.\.\) or PruneSID\(\.\.\.\), a list of pruners, None "
            r"\(off\) or 'default'",
        ),
        (
            [PixelPrune(), PixelPrune()],
            "names the pruners pixelprune, pixelprune, expected each of them once",
        ),
        ([None], "expected ppexport.PixelPrune"),
    ],
)
def test_what_is_no_pruner(pocket_bundle: Path, prune: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ppexport.load(pocket_bundle).encode(SCREEN, prune)  # type: ignore[arg-type]


@pytest.mark.newest
def test_the_command_line_builds_with_defaults(tmp_path: Path) -> None:
    """build --tau is what run, plan and eval do without options; what they are given changes that alone."""
    bundle = tmp_path / "bundle"
    command = ["build", str(POCKET), "-o", str(bundle), "-q", "--tau", "0.05", "--mode", "sliding"]
    assert runner().invoke(main, command).exit_code == 0
    own = PixelPrune(tau=0.05, anchored=False)
    pipe = ppexport.load(bundle)
    assert pipe.prune == (own,)

    def kept(*options: str) -> int:
        done = runner().invoke(
            main, ["run", str(bundle), "-i", str(SCREEN), "-n", "1", "--json", *options, QUESTION]
        )
        assert done.exit_code == 0, done.output
        return int(json.loads(done.stdout.splitlines()[0])["kept"])

    assert kept() == ppexport.select(SCREEN, own, min_pixels=9216).kept
    metric = PixelPrune(tau=0.05, anchored=False, metric="mae")
    assert kept("--metric", "mae") == ppexport.select(SCREEN, metric, min_pixels=9216).kept
    assert kept("--no-prune") == 143
    profiles = tmp_path / "profiles.json"
    done = runner().invoke(main, ["plan", str(SCREEN), "-o", str(profiles), "--bundle", str(bundle)])
    assert done.exit_code == 0, done.output
    assert f"max {kept()} " in done.stdout
    done = runner().invoke(main, ["eval", str(bundle), "-n", "2", "--skills", "read", "--json"])
    assert json.loads(done.stdout)["results"][0]["setting"] == "pred_2d tau 0.05"
    done = runner().invoke(
        main, ["build", str(POCKET), "-o", str(tmp_path / "b"), "--tau", "0", "--no-prune"]
    )
    assert done.exit_code == 2
    assert "--no-prune goes with no other option of pruning" in done.stderr


def test_questions_of_one_s_own(pocket_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.png").write_bytes(SCREEN.read_bytes())
    tasks = [
        {"image": "settings.png", "question": QUESTION, "answer": " porto"},
        {"image": "settings.png", "question": "What is the Brightness?", "answer": "47%"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, tasks)) + "\n\n")
    done = runner().invoke(
        main, ["eval", str(pocket_bundle), "--workload", str(file), "--json", "--no-prune"]
    )
    assert done.exit_code == 0, done.output
    (result,) = json.loads(done.stdout)["results"]
    assert (result["skill"], result["n"], result["accuracy"]) == ("mine.jsonl", 2, 0.5)
    assert result["answers"] == [[" porto", "Porto", 1.0], ["47%", "46%", 0.0]]
    done = runner().invoke(main, ["eval", str(pocket_bundle), "--workload", str(file)])
    assert "mine.jsonl" in done.stdout
    for content, message in (
        ("", "holds no questions"),
        ("{", "mine.jsonl:1: is no JSON"),
        (
            '{"image": "settings.png", "question": 3, "answer": "x"}',
            "mine.jsonl:1: found .* expected an object with",
        ),
        (json.dumps({**tasks[0], "image": "gone.png"}), "the image 'gone.png' is missing"),
    ):
        file.write_text(content)
        done = runner().invoke(main, ["eval", str(pocket_bundle), "--workload", str(file)])
        assert done.exit_code == 1
        assert message.split(" .*")[0] in done.stderr
    done = runner().invoke(main, ["eval", str(pocket_bundle), "--workload", "no/such.jsonl"])
    assert (done.exit_code, "cannot be read as a workload" in done.stderr) == (1, True)
