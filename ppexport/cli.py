"""The command line: parses, calls one plain function, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from . import logs
from .bench.commands import bench
from .interrupts import Interrupts
from .models.errors import PpexportError
from .models.precision import BITS, BYTES, Wanted
from .models.pruners.pixelprune import MOST_SEED, PRUNE_METHODS
from .models.version import __version__
from .options import (
    FiniteRange,
    as_asked,
    budget_of,
    calibration_of,
    cluster_of,
    cluster_options,
    device_option,
    engine_options,
    engines_of,
    feature_options,
    max_tokens_option,
    no_prune_option,
    prune_for,
    prune_options,
    prune_settings,
    revision_option,
    size_options,
    slots_option,
    weight_options,
    weights_of,
)
from .server.commands import serve


class Group(click.Group):
    """Prints the errors users can cause as one line and exits with 1; with 128 and its number after a signal."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Parse and run; what cannot even print its help says so."""
        try:
            return super().main(*args, **extra)
        except OSError as err:
            click.echo(f"Error: the output cannot be written: {err}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with Interrupts() as ctx.obj:
            try:
                return super().invoke(ctx)
            except PpexportError as err:
                raise click.ClickException(str(err)) from err
            except OSError as err:
                if err.errno == errno.EPIPE:
                    raise
                raise click.ClickException(f"the output cannot be written: {err}") from err
            except KeyboardInterrupt:
                # One that has passed through exec(), as torch uses it, makes CPython end the process with SIGINT,
                # whatever catches it. The next exec() makes it forget that.
                exec("")
                click.echo("Aborted!", err=True)
                ctx.exit(ctx.obj.exit_code)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Every command takes the options of logs, too."""
        for command in cmd.commands.values() if isinstance(cmd, click.Group) else [cmd]:
            command.params += logs.options()
        super().add_command(cmd, name)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Export vision-language models with pixel-space token pruning inside, and run them without torch."""


main.params += logs.options()


@main.command()
@click.argument("source", metavar="CHECKPOINT|BUNDLE", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="The bundle directory to make from a checkpoint.")
@click.option(
    "--precision",
    type=click.Choice(["auto", *BYTES, *BITS]),
    default="auto",
    show_default=True,
    help="How weights are stored; auto keeps the checkpoint's dtype. Engines calculate in it, ONNX Runtime on CPU in "
    "float32; int8 and int4 are weights in groups with a scale each; w8a8 rounds the inputs of products, too: the "
    "fastest first token on a CPU.",
)
@weight_options
@prune_options
@feature_options
@click.option(
    "--no-prune",
    is_flag=True,
    help="Requests that do not say how to prune keep every token, or with --prunesid every pixel.",
)
@click.option(
    "--dialect",
    type=click.Choice(["auto", "ort", "cuda", "standard", "plain"]),
    default="auto",
    show_default=True,
    help="ort: for ONNX Runtime on a CPU. cuda: for ONNX Runtime on an NVIDIA GPU, in 16 bits. standard: ONNX opset "
    "24, for TensorRT 10.15 or later and TensorRT-RTX. plain: opset 20, or 21 with integers, for TensorRT 10.3 "
    "(JetPack 6). auto: standard with a target, else ort.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    help="Compile engines; may be given several times. tensorrt needs a GPU, tensorrt-rtx none.",
)
@engine_options
@revision_option
@click.option("-q", "--quiet", is_flag=True, help="No progress, no notices.")
@click.pass_context
def build(
    ctx: click.Context,
    source: str,
    output: str | None,
    dialect: str,
    targets: tuple[str, ...],
    revision: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Make a bundle from a Hugging Face CHECKPOINT, or compile engines for a BUNDLE in place.

    CHECKPOINT is a directory, or a name on the hub, such as Qwen/Qwen2.5-VL-3B-Instruct.
    """
    from . import progress
    from .build_bundle import build as build_bundle
    from .build_bundle import compile_in_place

    wanted = weights_of(options)
    calibration = calibration_of(options)
    settings, no_prune = prune_settings(options)
    budget = budget_of(options)
    given = calibration or settings or no_prune or budget or revision
    changes = wanted != Wanted() or dialect != "auto" or given
    if output is None and (not targets or changes):
        raise click.UsageError("-o names the bundle to make; without it, a BUNDLE and --target are expected")
    sizes, engine = engines_of(**options)
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not targets and (sizes is not None or engine != type(engine)()):
        raise click.UsageError("sizes and options of engines go with --target")
    with progress.Bar(quiet, ctx.obj) as bar:
        if output is None:
            compile_in_place(source, targets, sizes, engine, bar.sizes, bar.update)
        else:
            build_bundle(
                source,
                output,
                wanted,
                dialect,
                targets,
                sizes,
                engine,
                calibration,
                bar.plan,
                bar.update,
                lambda own: as_asked(own, settings, no_prune, budget),
                revision,
            )
    if not quiet:
        from .compile_bundle import told

        for line in (line for target in targets for line in told(output or source, target)):
            click.echo(line, err=True)
        click.echo(f"built {output or source}")


@main.command()
@click.argument("bundle", type=click.Path())
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(), help="An image; may be given several times."
)
@prune_options
@feature_options
@size_options
@no_prune_option
@device_option
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the smallest set of tokens with this probability.",
)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 means all tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampling.")
@click.option(
    "--schema", type=click.Path(), metavar="FILE", help="A JSON schema: the answers are JSON that matches it."
)
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    show_default=True,
    help="Per graph; 0: one per core.",
)
@click.option(
    "--verify", is_flag=True, help="Check the hashes of the large files too, and compile for OpenVINO anew."
)
@click.option("--overlay", type=click.Path(), help="Write a picture of what was pruned of the first image.")
@click.option("--trace", type=click.Path(), help="Write the stages as a Chrome trace, for ui.perfetto.dev.")
@click.option("--no-reuse", is_flag=True, help="Compute further questions from the beginning, too.")
@click.option(
    "--json", "as_json", is_flag=True, help="Answer and statistics as a JSON object, one per question."
)
@click.option("-q", "--quiet", is_flag=True, help="The answers only.")
def run(bundle: str, prompts: tuple[str, ...], images: tuple[str, ...], **options: Any) -> None:
    """Ask BUNDLE one question or more (PROMPT) about images. Answers go to stdout, the statistics to stderr."""
    from .run import run as run_bundle

    settings, no_prune = prune_settings(options)
    budget = budget_of(options)
    if options["overlay"] and not images:
        raise click.UsageError("--overlay needs an image (-i)")
    run_bundle(bundle, prompts, images, lambda: prune_for(bundle, settings, no_prune, budget), **options)


@main.command()
@click.argument("bundle", type=click.Path())
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(), help="Shown with the first question."
)
@prune_options
@feature_options
@size_options
@no_prune_option
@device_option
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sampling.")
@click.pass_context
def chat(ctx: click.Context, bundle: str, images: tuple[str, ...], **options: Any) -> None:
    """A conversation with BUNDLE in the terminal; /help lists what else it takes."""
    from .chat import Chat
    from .chat import main as talk
    from .runtime.pipeline import load

    settings, no_prune = prune_settings(options)
    prune = prune_for(bundle, settings, no_prune, budget_of(options))
    sizes = {name: options.pop(name) for name in ("min_pixels", "max_pixels")}
    with load(bundle, options.pop("device"), **sizes) as pipe:
        conversation = Chat(pipe, prune=prune, **options)
        for image in images:
            conversation.show(image)
        if not talk(conversation, ctx.obj):
            ctx.exit(1)


@main.command()
@click.argument("bundle", type=click.Path())
@click.argument("requests", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="A line for each answer, in order.")
@slots_option
@max_tokens_option
@click.option("--name", help="What requests call the model. Default: the bundle's directory.")
@device_option
@cluster_options
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def batch(bundle: str, requests: str, output: str, quiet: bool, **options: Any) -> None:
    """Answer a file of REQUESTS with BUNDLE, a body of OpenAI's chat completions on each line.

    Lines that cannot be answered are told in OUTPUT's errors (a.jsonl: a.errors.jsonl). What was cut off goes on where
    it stopped when the same command is run again.
    """
    from .batch import Work
    from .batch import main as run_batch

    cluster = cluster_of(options)
    sys.exit(run_batch(Work(bundle, **options), requests, output, quiet, cluster))


@main.command("eval")
@click.argument("bundle", type=click.Path())
@click.option(
    "--workload",
    default="screens",
    show_default=True,
    metavar="screens|FILE.jsonl",
    help='Synthetic screens, or your own questions: {"image": ..., "question": ..., "answer": ...} on each line.',
)
@click.option(
    "--skills", help="Of the screens, comma-separated: read, transcribe, locate, yesno. Default: all."
)
@click.option(
    "--tau", "taus", type=click.FloatRange(0, 1), multiple=True, help="Prune at this tau; may be repeated."
)
@click.option(
    "--no-prune",
    is_flag=True,
    help="Keep every token, or with --prunesid all pixels; goes with --tau.",
)
@click.option("--method", type=click.Choice(PRUNE_METHODS), help="How to prune. Default: as the bundle.")
@feature_options
@device_option
@click.option(
    "-n", "--n", "count", type=click.IntRange(1), help="Questions per skill.  [default: 200; FILE: all]"
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, every answer included.")
def evaluate(bundle: str, workload: str, skills: str | None, **options: Any) -> None:
    """Accuracy of BUNDLE on held-out synthetic screens or your own questions, with confidence intervals."""
    from .eval import main as run_eval

    budget = budget_of(options)
    run_eval(bundle, workload, skills.split(",") if skills is not None else None, budget=budget, **options)


@main.command()
@click.argument("images", nargs=-1, type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="The profile file to write.")
@click.option("--bundle", type=click.Path(), help="Prune and resize as this bundle does.")
@prune_options
@size_options
@click.option("--no-prune", is_flag=True, help="Plan for images that are not pruned.")
@click.option(
    "--capacity", type=click.IntRange(2), help="Tokens in a cache.  [default: 4096; --memory: as build]"
)
@click.option(
    "--text-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of the longest question."
)
@click.option(
    "--patch", type=click.IntRange(1), help="Pixels per patch side.  [default: the bundle's, else 16]"
)
@click.option(
    "--merge", type=click.IntRange(1), help="Patches per token side.  [default: the bundle's, else 2]"
)
@click.option(
    "--information",
    is_flag=True,
    help="With --bundle: run its vision tower on the images, for budgets of PruneSID by --dynamic.",
)
@click.option(
    "--memory", is_flag=True, help="With --bundle: what its engines take on a device; needs no IMAGES."
)
@click.option(
    "--profiles",
    "given_profiles",
    type=click.Path(),
    help="With --memory: engines of these sizes, a file of 'plan'.",
)
@click.option(
    "--measure",
    "device",
    type=click.Choice(["cuda", "tensorrt", "tensorrt-rtx"]),
    help="With --bundle: prune the images on this device and on the host, and keep in the bundle which is faster.",
)
def plan(
    images: tuple[str, ...],
    output: str | None,
    bundle: str | None,
    information: bool,
    memory: bool,
    given_profiles: str | None,
    device: str | None,
    **sizes: Any,
) -> None:
    """Sizes for engines (build --profiles) from what pruning keeps of your IMAGES. Edit the file as you like.

    With --memory: what engines take on a device. With --measure: whether a device or its host prunes faster.
    """
    from . import plan_commands
    from .models import profiles as plan_profiles
    from .models.pruners.pixelprune import PixelPrune

    asked = [flag for flag, given in (("-o", output), ("--memory", memory), ("--measure", device)) if given]
    if not asked:
        raise click.UsageError("expected -o for a profile file, --memory or --measure")
    if (memory or device or information) and bundle is None:
        flag = "--memory" if memory else "--measure" if device else "--information"
        raise click.UsageError(f"{flag} looks at a bundle: --bundle names it")
    if given_profiles and (output or not memory):
        raise click.UsageError("--profiles goes with --memory, and without -o")
    if information and not output:
        raise click.UsageError("--information goes into a profile file: -o names it")
    if images and not (output or device):
        raise click.UsageError("--memory looks at no images, expected none, or -o or --measure, too")
    if not images and (output or device):
        raise click.UsageError(f"{asked[0]} looks at images, expected some")
    settings, no_prune = prune_settings(sizes)
    given = {name: value for name, value in sizes.items() if value is not None}
    if bundle is not None:
        prune = prune_for(bundle, settings, no_prune)
    else:
        prune = as_asked((PixelPrune(),), settings, no_prune) if settings or no_prune else "default"
    planned = plan_profiles.read(given_profiles) if given_profiles else None
    if output:
        planned = plan_commands.write_profiles(images, output, bundle, prune, information, given)
    if device and bundle:
        plan_commands.tell_measured(images, bundle, device, prune)
    if memory and bundle:
        plan_commands.tell_memory(bundle, planned, given)


@main.command()
@click.argument("images", nargs=-1, required=True, type=click.Path())
@prune_options
@feature_options
@size_options
@click.option(
    "--prune-seed", type=click.IntRange(0, MOST_SEED), help="Of --method random and conncomp.  [default: 0]"
)
@click.option("--bundle", type=click.Path(), help="Prune as this bundle does, after its vision tower, too.")
@click.option("--no-prune", is_flag=True, help="With --bundle and --prunesid: keep every pixel.")
@click.option(
    "--frames", is_flag=True, help="IMAGES are frames of one recording: drop what stands still, too."
)
@click.option("--patch", type=click.IntRange(1), help="Pixels per patch side.  [default: 16]")
@click.option("--merge", type=click.IntRange(1), help="Patches per token side.  [default: 2]")
@click.option(
    "--json", "as_json", is_flag=True, help="A list with everything of every image, kept indices included."
)
@click.option(
    "--overlay", type=click.Path(), help="A picture of what is kept and dropped; of several: a folder."
)
@click.option(
    "--sweep",
    type=click.Path(),
    help="Kept share over tau for each method that predicts, and for unique (the baselines keep as many as pred_2d): a "
    "table, and this plot (.png, .svg, .pdf).",
)
def inspect(images: tuple[str, ...], prune_seed: int | None, **options: Any) -> None:
    """Show what would be pruned of IMAGES, without a model (sizes as for Qwen3-VL), or with the one of a bundle."""
    from . import inspect as view
    from .models.pruners.pixelprune import PixelPrune

    bundle = options["bundle"]
    budget = budget_of(options)
    _check_inspect(options, budget)
    if prune_seed is not None and options["method"] not in ("random", "conncomp"):
        raise click.UsageError("--prune-seed is for --method random or conncomp")
    settings, no_prune = prune_settings(options)
    if no_prune and not budget:
        raise click.UsageError("--no-prune goes with --bundle and --prunesid: else there is nothing to show")
    if prune_seed is not None:
        settings["seed"] = prune_seed
    prune = PixelPrune(**settings) if bundle is None else prune_for(bundle, settings, no_prune, budget)
    view.main(images, prune, **{name: value for name, value in options.items() if value is not None})


def _check_inspect(options: dict[str, Any], budget: dict[str, Any]) -> None:
    """Raise UsageError for options of ``inspect`` that exclude each other."""

    def given(*names: str) -> str:
        found = next((name for name in names if options[name] not in (None, False)), "")
        return found.replace("_", "-")

    if options["sweep"] is not None and (other := given("tau", "method", "max_tokens", "overlay", "frames")):
        raise click.UsageError(f"--sweep goes with --metric and --mode only, found --{other}")
    if options["bundle"] is not None and (other := given("patch", "merge", "frames", "sweep")):
        raise click.UsageError(f"--bundle goes without --{other}")
    if options["bundle"] is None and budget:
        raise click.UsageError("--prunesid looks at features: --bundle names the bundle that computes them")


@main.command()
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--against",
    "checkpoint",
    type=click.Path(),
    help="The checkpoint they were built from, a directory or a name on the hub.",
)
@click.option(
    "--against-cpu",
    is_flag=True,
    help="Hold --device against the CPU instead; needs neither torch nor a checkpoint.",
)
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(), help="An image; may be given several times."
)
@click.option(
    "--question", default="Describe this image in detail.", show_default=True, help="Asked about the images."
)
@prune_options
@feature_options
@no_prune_option
@device_option
@click.option(
    "-n", "--tokens", type=click.IntRange(1), default=64, show_default=True, help="To generate and compare."
)
@revision_option
@click.option(
    "--cosine",
    type=FiniteRange(-1, 1),
    default=0.99,
    show_default=True,
    help="Least, of the features of any token.",
)
@click.option(
    "--kl", type=FiniteRange(0), default=0.05, show_default=True, help="Most, mean over the tokens, in nats."
)
@click.option(
    "--agreement",
    type=FiniteRange(0, 1),
    default=0.9,
    show_default=True,
    help="Least share of equal greedy tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def verify(
    bundles: tuple[str, ...],
    checkpoint: str | None,
    against_cpu: bool,
    images: tuple[str, ...],
    **options: Any,
) -> None:
    """Hold what bundles compute against their checkpoint in float32, or a device against the CPU, stage by stage.

    The exit code is 1 if one is too far off.
    """
    from .models.devices import places_of
    from .verify import main as run_verify

    if (checkpoint is None) != against_cpu:
        raise click.UsageError("expected either --against, the checkpoint, or --against-cpu")
    if against_cpu and set(places_of(options["device"]).values()) <= {"auto", "cpu"}:
        raise click.UsageError("--against-cpu needs a --device to hold against the CPU")
    settings, no_prune = prune_settings(options)
    budget = budget_of(options)
    prunes = [prune_for(bundle, settings, no_prune, budget) for bundle in bundles]
    sys.exit(run_verify(bundles, checkpoint, images, prunes=prunes, **options))


@main.command()
@click.argument("bundle", required=False, type=click.Path())
def doctor(bundle: str | None) -> None:
    """What is installed, what can be built and run here, what to install for the rest; and whether BUNDLE runs.

    The exit code is 1 if BUNDLE runs on no device here.
    """
    from .doctor import examine, runs_on

    runs = bundle is None
    for finding in examine(bundle):
        click.echo(f"{finding.name:<22}{finding.found}")
        runs = runs or finding == runs_on(finding.name)
        if finding.todo:
            click.echo(f"{'':<22}-> {finding.todo}")
    if not runs:
        sys.exit(1)


main.add_command(bench)
main.add_command(serve)

if __name__ == "__main__":
    sys.exit(main())
