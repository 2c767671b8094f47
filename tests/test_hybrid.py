"""Decoders with layers of linear attention: the gated delta rule, its states, and what of them can be reused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import GOLDEN
from invariants import relative_error
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_5 import modeling_qwen3_5

import ppexport
from ppexport import compile_bundle
from ppexport.build_bundle import build
from ppexport.doctor import examine
from ppexport.exporters import graphs
from ppexport.exporters.checkpoint import Checkpoint
from ppexport.exporters.lowering import ops
from ppexport.exporters.lowering.dialects import DIALECTS
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files
from ppexport.exporters.run_model import Asked, EagerModel
from ppexport.exporters.weights.attach import attach
from ppexport.models.families import family_of
from ppexport.models.precision import Wanted, resolve
from ppexport.runtime.backends.ort import OrtBinding
from ppexport.runtime.slots import MOST_KEPT
from ppexport.trt_build import Options, compile_graph
from ppexport.verify import verify

SCREEN = GOLDEN.parent.parent / "docs" / "settings.png"
ROOM = 1024  # tokens in a cache


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3_5") / "checkpoint"
    write_random(random_config("qwen3_5", "tiny", "float32"), directory, seed=3)
    write_text_files(directory, "qwen3_5")
    weights = load_file(directory / "model.safetensors")
    for (
        name,
        weight,
    ) in weights.items():  # as in trained models: heads that forget slowly, and learn all at once
        if name.endswith("A_log"):
            weights[name] = torch.linspace(-6.0, 0.5, len(weight))
        if name.endswith("in_proj_b.weight"):
            weights[name] = 20 * weight
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return build(checkpoint, checkpoint.parent / "bundle")


@pytest.fixture
def pipe(bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(bundle)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize(("heads", "alike"), [((2, 4), False), ((3, 3), False), ((2, 4), True)], ids=str)
def test_the_delta_rule(tokens: int, heads: tuple[int, int], alike: bool) -> None:
    """Chunk by chunk against transformers token by token, behind a state that is there already.

    ``alike``: keys as of a token that is repeated, by heads that hardly forget.
    """
    generator = torch.Generator().manual_seed(tokens)
    normal = lambda *sizes: torch.randn(2, *sizes, generator=generator)  # noqa: E731
    q, k = (torch.nn.functional.normalize(normal(tokens, heads[0], 16), dim=-1) for _ in range(2))
    v, state = normal(tokens, heads[1], 24), normal(heads[1], 16, 24)
    decay, beta = -normal(tokens, heads[1]).abs(), torch.sigmoid(normal(tokens, heads[1]))
    if alike:
        k = k[:, :1].expand(k.shape)
        decay, beta = decay / 50, torch.full_like(beta, 0.95)
    out, after = ops.delta_rule(q, k, v, decay, beta, state)
    expected, expected_after = modeling_qwen3_5.torch_recurrent_gated_delta_rule(
        q, k, v, g=decay, beta=beta, initial_state=state, output_final_state=True
    )
    assert relative_error(out.numpy(), expected.numpy()) < 1e-5
    assert relative_error(after.numpy(), expected_after.numpy()) < 1e-5


@pytest.fixture(scope="module", params=list(DIALECTS))
def decoder(
    request: pytest.FixtureRequest, checkpoint: Path
) -> Callable[[np.ndarray, list[int]], np.ndarray]:
    """Logits [S, V] of ids [S], run in parts of so many tokens, by the graph of a dialect in float32."""
    name = request.param
    opened = Checkpoint.open(checkpoint)
    model = opened.config
    graph = graphs.language_graph(model, DIALECTS[name])
    stored = resolve(Wanted(), "fp32", "ort" if name == "cuda" else name, False)  # cuda: 16 bits only
    attach(graph, opened, "language", opened.family.preprocessing, DIALECTS[name], stored)
    path = checkpoint.parent / f"{name}.onnx"
    ir.save(graph, path, external_data=f"{name}.data")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    caches = [state.name for state in model.states if state.by_token]

    def run(ids: np.ndarray, parts: list[int]) -> np.ndarray:
        states = {state.name: np.zeros(state.sized(1, ROOM), np.float32) for state in model.states}
        found = []
        at = 0
        for count in parts:
            place = np.arange(at, at + count, dtype=np.int32)
            feed: dict[str, Any] = {
                "input_ids": ids[None, at : at + count],
                "features": np.zeros((1, 1, model.text.width), np.float32),
                "feature_rows": np.full((1, count), -1, np.int32),
                "position_ids": np.broadcast_to(place, (3, 1, count)),
                "start": np.array([at], np.int32),
                "logits_at": np.arange(count, dtype=np.int32)[None],
            }
            for state, value in states.items():
                by_position = name == "plain" and state in caches
                feed[state] = value.transpose(2, 0, 1, 3) if by_position else value
            if "entries" in {value.name for value in session.get_inputs()}:
                feed["entries"] = np.arange(at + count, dtype=np.int32)
            made = dict(
                zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True)
            )
            found.append(made["logits"][0])
            for state in states:
                states[state] = made.get(f"new_{state}", states[state])
            for i, rows in enumerate(made.get("rows", ())):
                states[caches[i]][:, :, at : at + count] = rows.transpose(1, 2, 0, 3)
            at += count
        return np.concatenate(found)

    return run


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("parts", [[1], [63], [64], [65], [200], [1000], [64, 5, 1], [63, 66, 1, 1]], ids=str)
def test_every_dialect_is_the_model(
    decoder: Callable[[np.ndarray, list[int]], np.ndarray], checkpoint: Path, parts: list[int], alike: bool
) -> None:
    """However a prompt is cut, and token by token behind it; of random tokens, and of one that is repeated."""
    opened = Checkpoint.open(checkpoint)
    count = sum(parts)
    ids = np.random.default_rng(count).integers(5, 200, count).astype(np.int32)
    ids[1 if alike else count :] = 46
    places = np.broadcast_to(np.arange(count, dtype=np.int32), (3, count))
    eager = EagerModel(opened, opened.family.preprocessing, "reference")
    none = np.zeros((1, 1, opened.config.text.width), np.float32)
    prompt = Asked(ids, np.full(count, -1, np.int32), np.ascontiguousarray(places), none)
    expected = eager.logits(prompt, count)
    assert relative_error(decoder(ids, parts), expected) < 1e-5


@pytest.mark.parametrize(
    "kinds", [["full_attention"], ["linear_attention"] * 4, [["full_attention"]] * 4, [None] * 4]
)
def test_kinds_of_layers_that_cannot_be(kinds: list[Any]) -> None:
    config = random_config("qwen3_5", "tiny")
    config["text_config"]["layer_types"] = kinds
    with pytest.raises(
        ppexport.CheckpointError, match=r"layer_types is \[.*, expected linear_attention or full_atten"
    ):
        family_of(config).parse(config)


@pytest.mark.parametrize("last", ["linear_attention", "full_attention"])
def test_few_logits_of_a_prompt(tmp_path: Path, last: str) -> None:
    """The last layer, of either kind, goes on at the wanted positions alone."""
    config = random_config("qwen3_5", "tiny")
    text = config["text_config"]
    text["layer_types"] = ["full_attention", *["linear_attention"] * (text["num_hidden_layers"] - 2), last]
    write_random(config, tmp_path)
    write_text_files(tmp_path, "qwen3_5")
    opened = Checkpoint.open(tmp_path)
    eager = EagerModel(opened, opened.family.preprocessing, "reference")
    prompt = Asked(
        np.arange(70, dtype=np.int32),
        np.full(70, -1, np.int32),
        np.tile(np.arange(70, dtype=np.int32), (3, 1)),
        np.zeros((1, 1, opened.config.text.width), np.float32),
    )
    assert relative_error(eager.logits(prompt, 2), eager.logits(prompt, 70)[-2:]) < 1e-5


def asked(pipe: ppexport.Pipeline, question: str, *images: Any) -> tuple[str, ppexport.Stats]:
    answer = pipe.generate(question, list(images), max_new_tokens=9)
    return answer.text(), answer.stats


def test_another_question_goes_on_behind_the_image(pipe: ppexport.Pipeline, bundle: Path) -> None:
    """From the states that were kept there; what is kept counts as memory. Another picture does not."""
    first = asked(pipe, "What is this?", SCREEN)
    held = pipe.engine.held_bytes
    (slots,) = pipe.engine.placement.pools
    (copies,) = slots.listed[0].kept.values()
    size = sum(copy.nbytes for copy in copies.values())
    assert slots.forms[1].nbytes == 2 * size  # with what the graph puts out
    assert slots.nbytes == sum(form.nbytes for form in slots.forms) + size
    text, stats = asked(pipe, "And what else?", SCREEN)
    assert stats.reused_tokens >= first[1].kept > 0
    assert pipe.engine.held_bytes >= held
    other = np.full((64, 96, 3), 90, np.uint8)
    other_text, _ = asked(pipe, "And this?", other)
    with ppexport.load(bundle, reuse=0) as fresh:
        assert asked(fresh, "And what else?", SCREEN)[0] == text
        assert asked(fresh, "And this?", other)[0] == other_text


def test_copies_are_few_and_go_first(pipe: ppexport.Pipeline) -> None:
    """One for the picture of every turn would be the more memory the longer a conversation gets."""
    rng = np.random.default_rng(5)
    said: list[dict[str, Any]] = []
    first = 0
    for turn in range(6):
        picture = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": f"Question {turn}?"}]
        said.append({"role": "user", "content": parts})
        answer = pipe.generate(said, max_new_tokens=4)
        said.append({"role": "assistant", "content": answer.text()})
        (slots,) = pipe.engine.placement.pools
        places = sorted(slots.listed[0].kept)
        first = first or places[0]
        assert len(places) <= MOST_KEPT
        assert places[0] == first
    assert pipe.reuse is not None
    pipe.reuse.room = sum(form.nbytes for form in slots.forms)
    assert asked(pipe, "In words?")[0] is not None
    (slots,) = pipe.engine.placement.pools  # there is room for one, but not for copies
    assert not any(slot.kept for slot in slots.listed)


def test_an_interruption_adds_no_token_twice(
    pipe: ppexport.Pipeline, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the host waits for logits, states hold a token that nobody has noted; the next turn goes on behind it."""
    ids = list(range(5, 70))
    steps = pipe.generate_tokens(ids, max_new_tokens=9, stop=())
    said = [next(steps).token, next(steps).token]
    download = pipe.backend.download

    def interrupted(buffer: Any) -> np.ndarray:
        if buffer.dtype == "float32" and buffer.shape[-1] == pipe.manifest.model.text.vocab:
            raise KeyboardInterrupt
        return download(buffer)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.backend, "download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    del steps
    after = [*ids, *said, 7, 8]
    (step,) = pipe.generate_tokens(after, max_new_tokens=1, stop=())
    with ppexport.load(bundle, reuse=0) as fresh:
        (expected,) = fresh.generate_tokens(after, max_new_tokens=1, stop=())
    assert relative_error(step.logits, expected.logits) < 1e-4


def test_a_failed_run_ends_no_other(pipe: ppexport.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, say: what a run puts out goes to memory of its own first."""
    expected = list(pipe.generate_tokens([4, 5, 6], max_new_tokens=12, stop=()))
    pipe.engine.forget()
    first = pipe.prepare_tokens([4, 5, 6], max_new_tokens=12, stop=(), ahead=None)
    pipe.engine.add(first)
    pipe.engine.step()
    second = pipe.prepare_tokens([9] * 70, max_new_tokens=3, stop=(), ahead=None)
    pipe.engine.add(second)
    run = OrtBinding.run

    def failing(binding: OrtBinding) -> None:
        if binding._bound["input_ids"].shape[1] == 70:
            raise MemoryError("no more of it")
        run(binding)

    with monkeypatch.context() as patch:
        patch.setattr(OrtBinding, "run", failing)
        while not first.finished:
            pipe.engine.step()
    assert isinstance(second.error, MemoryError)
    assert [step.token for step in first.pending] == [step.token for step in expected]


def test_together_equals_alone(bundle: Path) -> None:
    """Bit for bit, at any place of a batch, beside slots that lie idle already."""
    shown = np.full((160, 192, 3), 90, np.uint8)
    shown[40:90, 70:] = 200
    with ppexport.load(bundle, reuse=0) as pipe:
        total = pipe.select(shown, None)[0].total
        image = [pipe.manifest.model.image_token] * total
        asked_for: list[tuple[list[int], list[np.ndarray], Any, int]] = [
            ([9, 8, 7], [], None, 20),
            ([9, *image, 4, 5], [shown], None, 4),
            ([3] * 70, [], None, 9),
            ([5, *image, 6, *image, 1], [shown, shown], ppexport.PixelPrune(), 14),
            ([7], [], None, 11),
        ]
        alone = [list(pipe.generate_tokens(*request, stop=())) for request in asked_for]
        sequences = [pipe.prepare_tokens(*request[:4], stop=(), ahead=None) for request in asked_for]
        for sequence in sequences:
            pipe.engine.add(sequence)
        most = 0
        while not all(sequence.finished for sequence in sequences):
            pipe.engine.step()
            most = max(most, *(len(slots.listed) for slots in pipe.engine.placement.pools), 0)
        assert most >= len(asked_for)
        for sequence, steps in zip(sequences, alone, strict=True):
            np.testing.assert_array_equal(
                [step.logits for step in sequence.pending], [step.logits for step in steps]
            )


def test_what_follows_a_system_prompt(pipe: ppexport.Pipeline, bundle: Path) -> None:
    """The second request shows where both differ, the third one goes on from there; no image is needed."""
    said = [{"role": "system", "content": "Answer in one word, and never in two. " * 9}]
    reused = []
    with ppexport.load(bundle, reuse=0) as fresh:
        for question in ("What is the total?", "Who signed it?", "In which year?", "And where?"):
            messages = [*said, {"role": "user", "content": question}]
            answer = pipe.generate(messages, max_new_tokens=5)
            assert answer.text() == fresh.generate(messages, max_new_tokens=5).text()
            reused.append(answer.stats.reused_tokens)
    assert reused[:2] == [0, 0]
    assert reused[2] == reused[3] == 320


def test_a_picture_of_which_one_token_is_left(pipe: ppexport.Pipeline) -> None:
    flat = np.full((320, 320, 3), 200, np.uint8)
    text, stats = asked(pipe, "What?", flat)
    assert (stats.kept, stats.total, stats.generated_tokens) == (1, 100, 9)
    assert text


def test_an_onnxruntime_that_does_not_know_the_operators(
    bundle: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the graphs are read; bundles of the dialect plain have standard operators."""
    monkeypatch.setattr(ort, "__version__", "1.29.2")
    with pytest.raises(
        ppexport.BackendError, match=r"onnxruntime 1.29.2, expected 1.30 or later; pip install"
    ):
        ppexport.load(bundle)
    (found,) = [finding for finding in examine() if finding.name == "ONNX Runtime"]
    assert "1.30 or later for Qwen3.5" in found.todo
    with ppexport.load(build(checkpoint, tmp_path / "plain", "fp32", "plain")) as pipe:
        assert asked(pipe, "What?", SCREEN)[0]


@pytest.mark.parametrize(
    ("precision", "least"), [("bf16", 0.9999), ("int8", 0.99), ("w8a8", 0.99), ("int4", 0.9)]
)
def test_other_precisions(checkpoint: Path, tmp_path: Path, precision: str, least: float) -> None:
    """What decays and what is learnt is not stored in integers: that adds up over the whole sequence."""
    bundle = build(checkpoint, tmp_path / "bundle", precision)
    report = verify(bundle, checkpoint, [str(SCREEN)], tokens=8)
    assert report.logits.cosine > least
    graph = ir.load(bundle / "language.onnx").graph
    kept = [name for name in graph.initializers if name.endswith((".a.weight", ".b.weight"))]
    assert len(kept) == 2 * 3


def test_a_vector_that_is_not_finite_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """It is so small that it is read while the graph is written."""
    broken = tmp_path / "broken"
    write_random(random_config("qwen3_5", "tiny", "bfloat16"), broken)
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("A_log"))
    weights[name][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ppexport.CheckpointError, match=f"'{name}' holds .* that are not finite"):
        build(broken, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_with_some_vectors_in_float32(checkpoint: Path, tmp_path: Path) -> None:
    """As published ones: its precision is that of its matrices."""
    mixed = tmp_path / "mixed"
    write_random(random_config("qwen3_5", "tiny", "bfloat16"), mixed)
    weights = load_file(mixed / "model.safetensors")
    weights = {name: w.float() if name.endswith("A_log") else w for name, w in weights.items()}
    save_file(weights, mixed / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(mixed).precision == "bf16"


@pytest.mark.parametrize(("target", "dialect"), [("tensorrt", "plain"), ("tensorrt-rtx", "standard")])
def test_further_questions_on_engines(checkpoint: Path, tmp_path: Path, target: str, dialect: str) -> None:
    """On the emulator, whose stream is behind: states that are copied and gone back to, answers as on the CPU."""
    options = Options(max_pixels=65536, capacity=512)
    questions = ("What is this?", "And what else?", "Who signed it?")
    pages = (SCREEN, np.full((96, 96, 3), 90, np.uint8))
    cpu = build(checkpoint, tmp_path / "cpu", "fp16")
    with emulator.installed(target):
        bundle = build(checkpoint, tmp_path / "bundle", "fp16", dialect, [target], None, options)
        with ppexport.load(bundle, target) as pipe, ppexport.load(cpu, max_pixels=65536, reuse=0) as fresh:
            reused = []
            for page in pages:
                for question in questions:
                    text, stats = asked(pipe, question, page)
                    assert text == asked(fresh, question, page)[0]
                    reused.append(stats.reused_tokens)
    assert reused[0] == 0
    assert min(reused[1], reused[2], reused[4], reused[5]) >= 8  # behind the image


@pytest.mark.parametrize("dialect", ["standard", "plain"])
def test_engines_compile(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    """Products in states of float32 are not rounded to TF32."""
    rounded = {}

    def watched(trt: Any, target: str, graph: str, *args: Any) -> Any:
        rounded[graph] = next(each for each in args if isinstance(each, Options)).tf32
        return compile_graph(trt, target, graph, *args)

    monkeypatch.setattr(compile_bundle, "compile_graph", watched)
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    options = Options(capacity=256, max_pixels=65536, compute_capabilities=("8.9",))
    path = build(checkpoint, tmp_path / "bundle", "bf16", dialect, ["tensorrt-rtx"], None, options)
    assert (path / "engines" / "tensorrt-rtx" / "language.engine").stat().st_size > 100_000
    assert rounded == {"prune": True, "vision": True, "language": False}
