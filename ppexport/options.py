"""Options that several commands share, and what they stand for. Heavy imports happen inside the functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from .models.errors import BackendError
from .models.precision import BITS, BYTES, GROUP_SIZES, Wanted
from .models.pruners.pixelprune import PRUNE_METHODS, PRUNE_METRICS
from .models.pruners.prunesid import MOST_BUDGET

if TYPE_CHECKING:
    from .cluster.connect import Cluster
    from .models.pruners import Pruner


def prune_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how to prune."""
    for option in reversed(
        [
            click.option(
                "--tau",
                type=click.FloatRange(0, 1),
                default=None,
                help="Largest byte difference, as a share of 255, at which two tokens count as equal. "
                "0 drops exact repetitions only. Default: what the bundle says, else 0.",
            ),
            click.option(
                "--mode",
                type=click.Choice(["anchored", "sliding"]),
                help="With --tau over 0, compare with the reconstruction (anchored: no error exceeds tau) or with the "
                "raw neighbour (sliding: errors can add up). Default: as the bundle, else anchored.",
            ),
            click.option(
                "--method", type=click.Choice(PRUNE_METHODS), help="Default: as the bundle, else pred_2d."
            ),
            click.option(
                "--metric",
                type=click.Choice(PRUNE_METRICS),
                help="Distance of two tokens. Default: as the bundle, else max.",
            ),
            click.option(
                "--max-tokens",
                type=click.IntRange(1),
                help="Of an image: raise tau to the smallest value that keeps no more.",
            ),
        ]
    ):
        command = option(command)
    return command


def feature_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how to prune behind the vision tower."""
    for option in (
        click.option(
            "--dynamic",
            metavar="FILE|NUMBER",
            help="With --prunesid: N is a mean, and images whose tokens resemble each other less get more. "
            "The file that 'ppexport plan --information' wrote of yours, or its number.",
        ),
        click.option(
            "--prunesid",
            type=click.IntRange(1, MOST_BUDGET),
            metavar="N",
            help="Of an image: keep at most N tokens of what the tower makes of it, a few of every semantic group "
            "(PruneSID). Default: what the bundle says, else all.",
        ),
    ):
        command = option(command)
    return command


def budget_of(options: dict[str, Any]) -> dict[str, Any]:
    """Take --prunesid and --dynamic out of ``options``: the settings of PruneSID, none where neither is given.

    Raises UsageError for --dynamic alone, RequestError for what is no number and no file of 'ppexport plan'.
    """
    tokens = options.pop("prunesid")
    dynamic = options.pop("dynamic")
    if tokens is None:
        if dynamic is not None:
            raise click.UsageError("--dynamic goes with --prunesid N, the mean budget")
        return {}
    if dynamic is None:
        return {"max_tokens": tokens}
    try:
        information = float(dynamic)
    except ValueError:
        from .models.errors import RequestError
        from .models.profiles import read

        found = read(dynamic).information
        if found is None:
            raise RequestError(
                f"{dynamic}: holds no information of images; write it with: ppexport plan IMAGES --bundle BUNDLE "
                "--information -o FILE"
            ) from None
        information = found
    return {"max_tokens": tokens, "dynamic": True, "information": information}


def size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say at which size images are looked at."""
    for option in reversed(
        [
            click.option(
                "--min-pixels", type=click.IntRange(1), help="Enlarge images below this many pixels."
            ),
            click.option(
                "--max-pixels", type=click.IntRange(1), help="Shrink images above this many pixels."
            ),
        ]
    ):
        command = option(command)
    return command


PRUNE = ("tau", "mode", "method", "metric", "max_tokens")


def prune_settings(options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Take the prune options out of ``options``: the settings of PixelPrune that the user gave, and --no-prune.

    Raises UsageError for both together; PruneSID goes with either (``prune_for``).
    """
    no_prune = options.pop("no_prune", False)
    given = {name: options.pop(name) for name in PRUNE if name in options}
    given = {name: value for name, value in given.items() if value is not None}
    if "mode" in given:
        given["anchored"] = given.pop("mode") == "anchored"
    if no_prune and given:
        raise click.UsageError("--no-prune goes with no other option of pruning but --prunesid")
    return given, no_prune


def prune_for(
    bundle: str, settings: dict[str, Any], no_prune: bool, budget: dict[str, Any] | None = None
) -> Any:
    """What to ask a bundle for: its own pruners, with the settings that were given.

    With ``no_prune`` there are none but the PruneSID of ``budget``.
    """
    if not (settings or budget):
        return None if no_prune else "default"
    from .models.pruners import pruners_of
    from .runtime.bundle import open_bundle

    own = () if no_prune else pruners_of(open_bundle(bundle)[1].prune)
    return as_asked(own, settings, no_prune, budget)


def as_asked(
    own: Iterable[Pruner], settings: dict[str, Any], no_prune: bool, budget: dict[str, Any] | None = None
) -> tuple[Pruner, ...]:
    """``own`` pruners, none of them with ``no_prune``, with what was given of PixelPrune and of PruneSID."""
    from .models.pruners import changed, with_budget

    found = () if no_prune else tuple(own)
    if settings:
        found = changed(found, settings)
    return with_budget(found, **budget) if budget else found


no_prune_option = click.option(
    "--no-prune", is_flag=True, help="Keep every token, or with --prunesid every pixel."
)
slots_option = click.option(
    "--slots", type=click.IntRange(1, 256), default=8, show_default=True, help="Requests that run together."
)
max_tokens_option = click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Of an answer whose request does not say.",
)


class FiniteRange(click.FloatRange):
    """A number in a range that is one, and finite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Not nan, which no comparison holds off."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is no finite number", param, ctx)
        return found


class RayAddress(click.ParamType):
    """Where a Ray cluster is."""

    name = "address"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is, unless it is what stands behind --ray by mistake."""
        import os

        if os.path.exists(value):
            self.fail(f"{value} is a file or folder, expected ADDRESS or nothing behind --ray", param, ctx)
        return value


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where copies of a bundle run with Ray."""
    for option in reversed(
        [
            click.option(
                "--ray",
                "address",
                type=RayAddress(),
                is_flag=False,
                flag_value="auto",
                metavar="[ADDRESS]",
                help="Run copies of the bundle on a Ray cluster: auto (the default; the one that runs here, else a new "
                "one of this machine), local (a new one), or HOST:PORT.",
            ),
            click.option(
                "--replicas",
                metavar="N|MIN-MAX",
                help="With --ray: copies. Default: from 1 to as many as fit.",
            ),
            click.option(
                "--cpus",
                type=click.IntRange(1, 1024),
                help="With --ray: of each copy. Default: all of a node's, shared by its GPUs.",
            ),
        ]
    ):
        command = option(command)
    return command


def cluster_of(options: dict[str, Any]) -> Cluster | None:
    """Take the options of a cluster out of ``options``; None without --ray. Raises UsageError."""
    address, replicas, cpus = (options.pop(name) for name in ("address", "replicas", "cpus"))
    if address is None:
        if replicas or cpus:
            raise click.UsageError("--replicas and --cpus go with --ray")
        return None
    from .cluster.connect import Cluster

    found = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", replicas or "1-9999")
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (2, 1)
    if most < least:
        raise click.UsageError(f"--replicas is {replicas!r}, expected a number such as 2, or 1-4")
    return Cluster(address, least, most if replicas else None, cpus)


revision_option = click.option(
    "--revision", help="Branch, tag or commit, of a checkpoint that is named as on the Hugging Face hub."
)


class Device(click.ParamType):
    """A device, or one for each stage (models/devices.py)."""

    name = "DEVICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it was given, if it is one."""
        from .models.devices import places_of

        try:
            places_of(value)
        except BackendError as err:
            self.fail(str(err), param, ctx)
        return str(value)


device_option = click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Where to run: auto, cpu, cuda, openvino (or openvino:GPU, openvino:NPU), tensorrt, tensorrt-rtx, or stage by "
    "stage, such as vision=openvino,language=cpu. auto takes engines of the bundle that run here, else the CPU, there "
    "with the vision tower on OpenVINO where that was measured to be faster, and says why.",
)


def weight_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how parts of a model are stored."""
    for option in reversed(
        [
            click.option(
                "--vision-precision", type=click.Choice([*BYTES, *BITS]), help="Of the vision tower."
            ),
            click.option("--head-precision", type=click.Choice([*BYTES, *BITS]), help="Of the output head."),
            click.option(
                "--embedding-precision", type=click.Choice([*BYTES, "int8"]), help="Of the token table."
            ),
            click.option(
                "--group-size",
                type=click.Choice([str(n) for n in GROUP_SIZES]),
                help="Weights per scale. [default: 32]",
            ),
            click.option("--asymmetric", is_flag=True, help="Groups with zero points (ONNX Runtime only)."),
            click.option(
                "--calibrate",
                multiple=True,
                type=click.Path(),
                help="An image like yours, or a folder of them, to fit int4 to; may be given several times.",
            ),
            click.option(
                "--calibrate-question", help="What is asked about them. Default: to describe the image."
            ),
        ]
    ):
        command = option(command)
    return command


def weights_of(options: dict[str, Any]) -> Wanted:
    """Take the options of the weights out of ``options``."""
    parts = {part: options.pop(f"{part}_precision") for part in ("vision", "head", "embedding")}
    group_size = options.pop("group_size")
    asymmetric = options.pop("asymmetric")
    return Wanted(
        options.pop("precision"), **parts, group_size=int(group_size or 32), symmetric=not asymmetric
    )


def calibration_of(options: dict[str, Any]) -> Any:
    """Take the options of calibration out of ``options``: a Calibration, or None where there are no images."""
    images = options.pop("calibrate")
    question = options.pop("calibrate_question")
    if not images:
        if question is not None:
            raise click.UsageError("--calibrate-question goes with --calibrate")
        return None
    from .calibration import Calibration

    return Calibration(images) if question is None else Calibration(images, question)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the engines that ``build --target`` compiles."""
    for option in reversed(
        [
            click.option(
                "--profiles", type=click.Path(), help="Sizes to compile for, a file of 'ppexport plan'."
            ),
            click.option(
                "--capacity", type=click.IntRange(2), help="Tokens in a cache.  [default: 4096; plain: 2048]"
            ),
            click.option(
                "--max-pixels",
                type=click.IntRange(1),
                help="Of an image.  [default: 2097152; plain: 1048576]",
            ),
            click.option(
                "--workspace", type=click.IntRange(1, 1 << 20), help="Scratch memory of an engine, in MB."
            ),
            click.option("--version-compatible", is_flag=True, help="tensorrt: for later versions, too."),
            click.option(
                "--hardware-compatible", is_flag=True, help="tensorrt: for all GPUs from Ampere on."
            ),
            click.option(
                "--compute-capability", "compute_capabilities", multiple=True, help="RTX: for this one only."
            ),
            click.option("--timing-cache", type=click.Path(), help="tensorrt: a file reused between builds."),
        ]
    ):
        command = option(command)
    return command


def engines_of(
    profiles: str | None, workspace: int | None, timing_cache: str | None, **given: Any
) -> tuple[Any, Any]:
    """Profiles (or None) and engine options of the command line."""
    from pathlib import Path

    from .models import profiles as files
    from .trt_build import Options

    given = {name: value for name, value in given.items() if value not in (None, ())}
    if profiles and (clash := sorted({"capacity", "max_pixels"} & set(given))):
        raise click.UsageError(
            f"--{clash[0].replace('_', '-')} is in the profile file; expected it there only"
        )
    options = Options(
        workspace=None if workspace is None else workspace << 20,
        timing_cache=None if timing_cache is None else Path(timing_cache),
        **given,
    )
    return files.read(profiles) if profiles else None, options
