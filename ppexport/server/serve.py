"""``ppexport serve``: a bundle at an address, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..models.errors import BackendError, RequestError
from ..runtime.pipeline import REUSE
from .images import ImageRules
from .metrics import Metrics
from .service import Limits, Service, load_for_chats

if TYPE_CHECKING:
    from fastapi import FastAPI

LOG = logging.getLogger(__name__)
SHORTEST_KEY = 8


@dataclass(frozen=True)
class Address:
    """Where to listen."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free

    @property
    def url(self) -> str:
        """Of it."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class Setup:
    """What is served, and how."""

    bundle: str
    limits: Limits = field(default_factory=Limits)
    rules: ImageRules = field(default_factory=ImageRules)
    device: str = "auto"
    context: int | None = None  # tokens of the longest sequence; None: the model's
    name: str | None = None  # of the model; None: the bundle's directory
    key: str | None = None  # what clients have to send
    most_bytes: int = 64 << 20  # of a body
    drain_seconds: float = 30.0  # that requests have to end
    reuse: int = REUSE  # bytes for what past requests computed

    def open(self, threads: int = 0, metrics: Metrics | None = None) -> Service:
        """The service, not started. Raises BundleError, BackendError, and RequestError for one without a tokenizer."""
        pipe = load_for_chats(
            self.bundle,
            self.device,
            threads=threads,
            together=self.limits.slots,
            context=self.context,
            reuse=self.reuse,
        )
        name = self.name or Path(self.bundle).resolve().name
        return Service(pipe, name, self.limits, self.rules, metrics)

    def app(self, service: Service) -> FastAPI:
        """What answers over HTTP with a service."""
        from .app import create_app

        return create_app(service, self.key, self.most_bytes)


def serve(setup: Setup, address: Address, ready: Callable[[str], None] = lambda url: None) -> None:
    """Answer requests until SIGTERM or SIGINT: then no more are taken, and those inside have time to end.

    ``ready`` is told the URL. Raises BundleError, BackendError (the address cannot be listened at), RequestError.
    """
    import uvicorn

    from .connections import impatient, raise_limit

    raise_limit()
    with listening(address) as listener:
        service = setup.open()
        config = uvicorn.Config(
            setup.app(service),
            http=impatient(),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        host, port = listener.getsockname()[:2]
        service.start()
        try:
            ready(Address(host, port).url)
            asyncio.run(_until_told(uvicorn.Server(config), service, listener, setup.drain_seconds))
        finally:
            service.close()


async def _until_told(server, service: Service, listener: socket.socket, drain_seconds: float) -> None:  # type: ignore[no-untyped-def]
    """Serve; at the first signal drain, at the second one end at once."""
    events = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    async def drain() -> None:
        LOG.info("draining", extra={"fields": {"requests": service.inside}})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(service.empty(), drain_seconds)
        server.should_exit = True

    def told() -> None:
        if draining:
            server.should_exit = True
            server.force_exit = True
            return
        service.draining = True
        draining.append(asyncio.ensure_future(drain()))

    def handle(number: int, frame: FrameType | None) -> None:
        events.call_soon_threadsafe(told)

    server.handle_exit = handle
    await server.serve(sockets=[listener])


@contextlib.contextmanager
def listening(address: Address) -> Iterator[socket.socket]:
    """A socket at an address. Raises BackendError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # asyncio sends small parts at once (TCP_NODELAY) only where the protocol is named; else each waits 40 ms for the
    # acknowledgement of the one before
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere it would share the address with others
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(512)
    except (OSError, OverflowError) as err:
        listener.close()
        raise BackendError(
            f"cannot listen at {address.host} port {address.port}: {err}; choose another --port or --host"
        ) from err
    with listener:
        yield listener


def read_key(given: str | None) -> str | None:
    """An API key, or the first line of the file that "@FILE" names. Raises RequestError for one that is too short."""
    if given is None:
        return None
    found = given
    if given.startswith("@"):
        try:
            found = Path(given[1:]).read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, ValueError) as err:
            raise RequestError(f"{given[1:]}: the API key cannot be read: {err}") from err
    if len(found) < SHORTEST_KEY or not found.isascii() or not found.isprintable():
        raise RequestError(
            f"the API key has {len(found)} characters, expected {SHORTEST_KEY} or more, printable ASCII"
        )
    return found
