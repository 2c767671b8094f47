"""``ppexport bench``, ``bench compare`` and ``bench report``. Heavy imports happen inside the functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.checks import writable
from ..models.errors import PpexportError, RequestError
from ..models.files import write_text
from ..options import FiniteRange, device_option
from ..table import aligned

if TYPE_CHECKING:
    from .compare import Comparison

RUN = "run"


class BenchGroup(click.Group):
    """``ppexport bench BUNDLE`` is ``ppexport bench run BUNDLE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command in that goes without saying."""
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


class Numbers(click.ParamType):
    """Comma-separated numbers; ``off`` stands for None where it is allowed."""

    name = "list"

    def __init__(self, kind: type, low: float, high: float, off: bool = False):
        self.kind = kind
        self.low = low
        self.high = high
        self.off = off

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """A tuple without repetitions."""
        if isinstance(value, tuple):
            return value
        found: list[Any] = []
        for part in str(value).split(","):
            if part.strip() == "off" and self.off:
                found.append(None)
                continue
            try:
                number = self.kind(part)
                if not self.low <= number <= self.high:
                    raise ValueError
            except ValueError:
                also = " or off" if self.off else ""
                self.fail(
                    f"{part!r}, expected {self.low:g} to {self.high:g}{also}, separated by commas", param, ctx
                )
            found.append(number)
        return tuple(dict.fromkeys(found))


class Share(click.ParamType):
    """``5%`` or ``0.05``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """A share of 1."""
        try:
            return share(value)
        except RequestError as err:
            self.fail(str(err), param, ctx)


def share(value: float | str) -> float:
    """``5%``, ``"0.05"`` or 0.05 as a share of 1; raises RequestError."""
    try:
        text = str(value).strip()
        found = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < 1:
        raise RequestError(f"tolerance is {value!r}, expected a share such as 5% or 0.05")
    return found


@click.group("bench", cls=BenchGroup)
def bench() -> None:
    """Measure a bundle, compare two measurements, report them. 'bench BUNDLE' is 'bench run BUNDLE'."""


@bench.command(RUN)
@click.argument("bundle", type=click.Path())
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(), help="An image, or a folder of them."
)
@click.option(
    "--workload", default="documents", show_default=True, help="desktop, documents or screens; without -i."
)
@click.option("--prompt", help="What is asked about every image.")
@click.option(
    "--tau", "taus", type=Numbers(float, 0, 1, off=True), default="0,off", show_default=True, help="Pruning."
)
@click.option(
    "--concurrency", type=Numbers(int, 1, 64), default="1", show_default=True, help="Requests at a time."
)
@click.option(
    "--runs", "rounds", type=click.IntRange(1), help="Rounds over all settings and images.  [default: 20]"
)
@click.option(
    "--duration",
    type=click.FloatRange(0, min_open=True),
    help="Seconds, in place of --runs (but 6 rounds at least).",
)
@click.option(
    "--warmup", type=click.IntRange(0), default=2, show_default=True, help="Rounds that do not count."
)
@click.option(
    "--cold", type=click.IntRange(0), default=3, show_default=True, help="New processes, for cold starts."
)
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Longest answer."
)
@click.option(
    "--ignore-eos", is_flag=True, help="Answers as long as -n says, whatever the model would end at."
)
@click.option("--min-pixels", type=click.IntRange(1), help="Enlarge images below this many pixels.")
@click.option("--max-pixels", type=click.IntRange(1), help="Shrink images above this many pixels.")
@click.option(
    "--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="Per graph; 0: all cores."
)
@click.option("--no-pictures", is_flag=True, help="Leave what was pruned out of the result.")
@device_option
@click.option("-o", "--output", type=click.Path(), help="Write the result, for compare and report.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def run(
    bundle: str,
    images: tuple[str, ...],
    workload: str,
    prompt: str | None,
    rounds: int | None,
    duration: float | None,
    no_pictures: bool,
    output: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure BUNDLE: times of every stage and token, with and without pruning, settings taking turns."""
    from ..progress import Bar
    from ..runtime.pdf import file_of
    from . import schema
    from .measure import Plan, measure
    from .workload import open_workload

    if rounds and duration:
        raise click.UsageError("--runs and --duration exclude each other")
    source = click.get_current_context().get_parameter_source("workload")
    if images and source is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--workload is for measuring without -i")
    if output is not None:
        writable(output, [bundle, *map(file_of, images)])
    name, questions = open_workload(workload, images, prompt)
    plan = Plan(rounds=rounds or Plan.rounds, duration=duration, pictures=not no_pictures, **options)
    context = click.get_current_context()
    interrupts = context.find_root().obj
    with Bar(quiet, interrupts) as bar:
        result = measure(bundle, name, questions, plan, bar.update)
    for line in summary(result):
        click.echo(line)
    if output is not None:
        schema.write(result, output)
        click.echo(f"wrote {output}")
    if interrupts.number is not None:
        click.echo(f"interrupted: the {result.rounds} rounds until then are kept", err=True)
        context.exit(interrupts.exit_code)


def summary(result: Any) -> list[str]:
    """A result in a few lines."""
    from .schema import STAGES

    metrics = ("ttft", "tpot", "e2el", *STAGES, "other")
    rows = [["ms, medians", "kept", *metrics, "requests/s", "tokens/s"]]
    for s in result.settings:
        cells = [f"{s.metrics[name].median.value:.1f}" if name in s.metrics else "" for name in metrics]
        rows.append(
            [
                s.name,
                f"{s.kept}/{s.total}",
                *cells,
                f"{s.request_throughput:.2f}",
                f"{s.output_throughput:.1f}",
            ]
        )
    lines = aligned(rows)
    longest = max(r.output_tokens for s in result.settings for r in s.requests)
    if result.options.ignore_eos and longest < result.options.max_new_tokens:
        lines.append(
            f"answers have {longest} tokens, not the {result.options.max_new_tokens} asked for: the context ends there"
        )
    if result.cold:
        lines.append(
            f"first token of a new process: {result.cold.median.value:.0f} ms (median of {result.cold.n})"
        )
    lines.append(
        f"peak RSS {result.peak_rss_bytes / 1e6:.0f} MB; {result.rounds} rounds; {result.bundle.device}"
    )
    return lines


@bench.command()
@click.argument("base", type=click.Path())
@click.argument("new", type=click.Path())
@click.option("--tolerance", type=Share(), default="5%", show_default=True, help="A change that is accepted.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    help="Such as ttft.p50 or e2el.p95; of 'bench serve' time_to_first_token.p90. Default: p10 of all but itl.",
)
@click.option(
    "--accuracy", is_flag=True, help="Judge the answers, too, where the workload knows the right ones."
)
@click.option("--any-machine", is_flag=True, help="Compare results of different machines.")
@click.option(
    "--markdown", type=click.Path(), help="Add a summary to this file, such as $GITHUB_STEP_SUMMARY."
)
@click.option("--json", "as_json", is_flag=True, help="All verdicts as a JSON object.")
@click.pass_context
def compare(
    ctx: click.Context,
    base: str,
    new: str,
    tolerance: float,
    metrics: tuple[str, ...],
    accuracy: bool,
    any_machine: bool,
    markdown: str | None,
    as_json: bool,
) -> None:
    """Judge the result NEW by the result BASE, both of 'bench', or both of 'bench serve'.

    Exits with 0 if nothing regressed, with 1 if something did, with 3 if something cannot be told, and with 2 if files
    cannot be compared at all.
    """
    try:
        if markdown:  # empty where $GITHUB_STEP_SUMMARY is: not on GitHub
            writable(markdown, [base, new])
        from . import compare as judge

        found, title, about = compared(base, new, tolerance, metrics or None, accuracy, any_machine)
    except PpexportError as err:
        click.echo(f"Error: {err}", err=True)
        ctx.exit(2)  # 1 would be a regression
    click.echo(judge.dumps(found) if as_json else "\n".join(judge.text(found)))
    if markdown:
        try:
            judge.append(judge.markdown(found, title, about), markdown)
        except OSError as err:
            click.echo(f"Error: {markdown}: cannot be written: {err}", err=True)
            ctx.exit(found.exit_code or 2)
    ctx.exit(found.exit_code)


def compared(
    base: str,
    new: str,
    tolerance: float,
    metrics: Sequence[str] | None,
    accuracy: bool,
    any_machine: bool,
) -> tuple[Comparison, str, str]:
    """The verdicts on two files, what they are of, and where and when that was measured. Raises RequestError."""
    from . import compare as judge
    from . import load_compare, schema

    first, second = schema.loaded(base), schema.loaded(new)
    loads = load_compare.parsed(first, base), load_compare.parsed(second, new)
    if loads[0] is None and loads[1] is None:
        before, after = schema.parsed(first, base), schema.parsed(second, new)
        found = judge.compare(before, after, tolerance, metrics, accuracy, any_machine)
        title, what, machine, created = (
            f"Latency of {after.bundle.name}",
            f"Workload {after.workload}",
            after.machine,
            before.created,
        )
    elif loads[0] is None or loads[1] is None:
        raise RequestError("one of the results is of 'bench serve', expected both or neither")
    elif accuracy:
        raise RequestError("--accuracy is for results of 'bench', expected none of 'bench serve'")
    else:
        found = load_compare.compare_loads(loads[0], loads[1], tolerance, metrics, any_machine)
        title, what, machine, created = (
            f"Load of {loads[1].options.get('url')}",
            "Sent from",
            loads[1].machine,
            loads[0].created,
        )
    return found, title, f"{what}; {machine.cpu}, {machine.cores} cores; base of {created}."


@bench.command()
@click.argument("results", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="The page to write, .html.")
def report(results: Sequence[str], output: str) -> None:
    """One page about RESULTS: stages, distributions, kept tokens, the pruned pictures. It needs nothing else."""
    from . import report as page
    from . import schema

    target = writable(output, results)
    text = page.render([schema.read(path) for path in results], [Path(path).stem for path in results])
    write_text(target, text)
    click.echo(f"wrote {output}")


@bench.command("serve")
@click.argument("url")
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(), help="An image, or a folder of them."
)
@click.option("--prompt", default="Describe this image in detail.", show_default=True, help="What is asked.")
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True, help="In all.")
@click.option(
    "--concurrency", type=click.IntRange(1, 512), default=8, show_default=True, help="Requests at a time."
)
@click.option(
    "--rate",
    type=FiniteRange(0, min_open=True),
    help="Requests per second, arriving at random, in place of --concurrency.",
)
@click.option(
    "-n", "--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Longest answer."
)
@click.option("--no-prune", is_flag=True, help="Ask for every token to be kept.")
@click.option("--api-key", metavar="KEY|@FILE", help="What the server asks for.")
@click.option(
    "--slo-ttft", type=click.FloatRange(0), metavar="MS", help="For the goodput: first token within."
)
@click.option(
    "--slo-tpot", type=click.FloatRange(0), metavar="MS", help="For the goodput: time per token within."
)
@click.option("-o", "--output", type=click.Path(), help="Write everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def serve(
    url: str,
    images: tuple[str, ...],
    prompt: str,
    requests: int,
    concurrency: int,
    rate: float | None,
    max_tokens: int,
    no_prune: bool,
    api_key: str | None,
    slo_ttft: float | None,
    slo_tpot: float | None,
    output: str | None,
    quiet: bool,
) -> None:
    """Send requests to a server at URL ('ppexport serve' or another one with OpenAI's API) and time their answers."""
    import io
    import json
    import sys

    from ..runtime.pdf import file_of
    from ..server.serve import read_key
    from .load import Load, as_json, lines, measure, summary

    prune = "off" if no_prune else "default"
    load = Load(url, images, prompt, requests, concurrency, rate, max_tokens, prune, read_key(api_key))
    if output is not None:
        writable(output, map(file_of, images))
    bar_shown = io.StringIO() if quiet else sys.stderr
    with click.progressbar(length=requests, label="requests", file=bar_shown) as bar:
        found, seconds = measure(load, lambda done: bar.update(1))
    metrics = summary(found, seconds, slo_ttft, slo_tpot)
    for line in lines(metrics):
        click.echo(line)
    for error in sorted({timed.error for timed in found if timed.error})[:5]:
        click.echo(f"error: {error:.200}", err=True)
    if output is not None:
        write_text(output, json.dumps(as_json(load, found, metrics)) + "\n")
    if metrics["error_request_count"]["avg"]:
        sys.exit(1)
