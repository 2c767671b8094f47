"""``ppexport serve``: a bundle at an address, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..models.errors import BackendError, RequestError
from ..runtime.pipeline import load
from .images import ImageRules
from .service import Limits, Service

LOG = logging.getLogger(__name__)
SHORTEST_KEY = 8


@dataclass(frozen=True)
class Address:
    """Where to listen."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free


def serve(
    bundle: str,
    address: Address = Address(),
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    rules: ImageRules = ImageRules(),  # noqa: B008 (frozen)
    device: str = "auto",
    context: int | None = None,
    name: str | None = None,
    key: str | None = None,
    most_bytes: int = 64 << 20,
    drain_seconds: float = 30.0,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Answer requests until SIGTERM or SIGINT: then no more are taken, and those inside have ``drain_seconds`` to end.

    ``name``: what the model is called, by default as the bundle's directory; ``ready`` is told the URL. Raises
    BundleError, BackendError (packages, or the address cannot be listened at), RequestError.
    """
    try:
        import uvicorn

        from .app import create_app
    except ImportError as err:
        raise BackendError(
            f"{err.name} is not installed, expected for 'ppexport serve'; install it with: "
            "pip install 'ppexport[serve]'"
        ) from err
    with _listening(address) as listener:
        pipe = load(bundle, device, together=limits.slots, context=context)
        if pipe.text is None:
            pipe.close()
            raise RequestError(
                f"{bundle}: has no tokenizer (its checkpoint had none), expected one to serve chats"
            )
        service = Service(pipe, name or Path(bundle).resolve().name, limits, rules)
        config = uvicorn.Config(
            create_app(service, key, most_bytes),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        host, port = listener.getsockname()[:2]
        service.start()
        try:
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            asyncio.run(_until_told(uvicorn.Server(config), service, listener, drain_seconds))
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
def _listening(address: Address) -> Iterator[socket.socket]:
    """A socket at an address. Raises BackendError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server((address.host, address.port), family=family, backlog=512)
    except (OSError, OverflowError) as err:
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
