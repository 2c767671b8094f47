"""How many connections there may be, and how long one may be idle before its first request."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

PATIENCE = (
    30.0  # seconds for the first request of a connection; uvicorn closes those that are idle between two
)
FILES = 65_536  # open ones, of which each connection is one


def raise_limit() -> None:
    """Let the process hold as many connections as the system allows, up to FILES."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def impatient() -> type[asyncio.Protocol]:
    """uvicorn's protocol of HTTP, which closes connections that ask for nothing."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            asyncio.get_running_loop().call_later(PATIENCE, self._give_up, transport)

        def _give_up(self, transport: Any) -> None:
            if self.cycle is None:  # no request yet
                transport.close()

    return Impatient
