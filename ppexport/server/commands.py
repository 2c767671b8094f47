"""The command ``ppexport serve``. Heavy imports happen inside."""

from __future__ import annotations

import re
from typing import Any

import click

from ..models.errors import BackendError
from ..options import FiniteRange, cluster_of, cluster_options, device_option, max_tokens_option, slots_option


class Host(click.ParamType):
    """The name of a machine, as it stands in URLs."""

    name = "host"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is."""
        if not re.fullmatch(r"[\w.-]+", value):
            self.fail(
                f"{value!r:.80} is no name of a host, expected one such as images.example.org", param, ctx
            )
        return value


@click.command()
@click.argument("bundle", type=click.Path())
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all of them."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free."
)
@click.option("--name", help="What clients call the model. Default: the bundle's directory.")
@slots_option
@click.option(
    "--queue",
    type=click.IntRange(0, 100_000),
    default=32,
    show_default=True,
    help="Requests that may wait; more get 429.",
)
@click.option("--context", type=click.IntRange(2), help="Tokens of prompt and answer. Default: the model's.")
@click.option(
    "--reuse",
    type=click.IntRange(0),
    default=1024,
    show_default=True,
    help="MiB for what past requests computed: pictures and conversations that come again.",
)
@max_tokens_option
@click.option(
    "--timeout",
    type=FiniteRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds for one request, waiting included.",
)
@click.option(
    "--drain",
    type=FiniteRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that requests have to end after SIGTERM.",
)
@click.option("--api-key", metavar="KEY|@FILE", help="Clients have to send it; @FILE: its first line.")
@click.option(
    "--allow-remote",
    "hosts",
    multiple=True,
    type=Host(),
    metavar="HOST",
    help="Fetch images from this host, too; may be given several times. Default: data: URLs only.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="MiB of a request, images included.",
)
@click.option(
    "--max-images", type=click.IntRange(0), default=16, show_default=True, help="Images of a request."
)
@device_option
@cluster_options
def serve(
    bundle: str,
    host: str,
    port: int,
    name: str | None,
    slots: int,
    queue: int,
    context: int | None,
    reuse: int,
    max_tokens: int,
    timeout: float,
    drain: float,
    api_key: str | None,
    hosts: tuple[str, ...],
    max_body: int,
    max_images: int,
    device: str,
    **options: Any,
) -> None:
    """Answer requests with BUNDLE over HTTP, by OpenAI's API, and show a page to try it at /."""
    cluster = cluster_of(options)
    try:
        from .images import ImageRules
        from .serve import Address, Setup, read_key
        from .serve import serve as run
        from .service import Limits
    except ImportError as err:
        raise BackendError(
            f"{err.name} is not installed, expected for 'ppexport serve'; install it with: "
            "pip install 'ppexport[serve]'"
        ) from err

    def ready(url: str) -> None:
        click.echo(f"serving {bundle} at {url}", err=True)

    setup = Setup(
        bundle,
        Limits(slots, queue, max_tokens, timeout),
        ImageRules(max_images, max_body << 20, hosts),
        device,
        context,
        name,
        read_key(api_key),
        max_body << 20,
        drain,
        reuse << 20,
    )
    if cluster is None:
        run(setup, Address(host, port), ready)
        return
    from ..cluster.serve import serve as run_copies

    run_copies(setup, Address(host, port), cluster, ready)
