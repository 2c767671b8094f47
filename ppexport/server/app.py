"""The HTTP side: routes, and how long a body may be. Everything else is in service.py."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..models.pruners.pixelprune import PRUNE_METHODS, PixelPrune
from ..models.version import __version__
from .chat import ChatWriter
from .errors import ApiError, invalid
from .protocol import ChatRequest, from_json, parse, parse_select
from .service import Piece, Service

LOG = logging.getLogger(__name__)
GONE = 499  # the client went away; nobody reads this status but the metrics
PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
BODY_SECONDS = 60.0  # for a body to come
LAST_WORDS = 5.0  # seconds for what is told when the time of a request is over
DROPPED = 8  # times the longest body: what is read of one that is too long
DONE = "data: [DONE]\n\n"


def create_app(service: Service, key: str | None = None, most_bytes: int = 64 << 20) -> FastAPI:
    """``key``: what clients have to send as "Authorization: Bearer KEY"; ``most_bytes`` of a request's body."""
    app = FastAPI(title="ppexport", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(Exception, _failed)
    routes = _Routes(service, key, most_bytes)
    app.get("/")(routes.page)
    app.api_route("/health", methods=["GET", "HEAD"])(routes.health)
    app.get("/metrics")(routes.metrics)
    known = [Depends(routes.known)]
    app.get("/v1/models", dependencies=known)(routes.models)
    app.get("/v1/models/{name:path}", dependencies=known)(routes.model)
    app.post("/v1/chat/completions", dependencies=known)(routes.chat_completions)
    app.post("/v1/ppexport/select", dependencies=known)(routes.select)
    return app


async def _refused(_: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, ApiError)
    return JSONResponse(err.body, err.status, err.headers)


async def _unknown(request: Request, err: Exception) -> JSONResponse:
    assert isinstance(err, HTTPException)
    message = f"{request.method} {request.url.path}: {err.detail}"
    return JSONResponse(invalid(message).body, err.status_code, err.headers)


async def _failed(_: Request, err: Exception) -> JSONResponse:
    LOG.error("a request failed", exc_info=err)
    return JSONResponse(ApiError(500, "the server failed; its log says how", kind="server_error").body, 500)


class _Routes:
    """What is answered at which path."""

    def __init__(self, service: Service, key: str | None, most_bytes: int):
        self.service = service
        self.key = key
        self.most_bytes = most_bytes

    async def known(self, request: Request) -> None:
        """Let nobody in without the key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            message = "the API key is missing or wrong, expected it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, kind="authentication_error", code="invalid_api_key")

    async def page(self) -> Response:
        """The page to try the bundle at: one file that loads nothing else."""
        return Response(PAGE.read_text(encoding="utf-8"), media_type="text/html", headers=PAGE_HEADERS)

    async def health(self) -> JSONResponse:
        """200 if the next request would be taken."""
        state = self.service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self) -> Response:
        """As Prometheus reads them."""
        text, kind = await self.service.measured()
        return Response(text, media_type=kind)

    async def models(self) -> dict[str, Any]:
        """The only one."""
        return {"object": "list", "data": [_model(self.service)]}

    async def model(self, name: str) -> dict[str, Any]:
        """By its name."""
        if name != self.service.name:
            raise ApiError(404, f"the model {name!r:.80} is not served here", "model", code="model_not_found")
        return _model(self.service)

    async def select(self, request: Request) -> dict[str, Any]:
        """What would be kept of a picture."""
        self.service.admit()
        try:
            body = await _body(request, self.most_bytes)
            return await self.service.select(await asyncio.to_thread(lambda: parse_select(from_json(body))))
        finally:
            self.service.leave()

    async def chat_completions(self, request: Request) -> Response:
        """Answer a chat."""
        service = self.service
        status = 500
        try:
            service.admit()
            streams = False  # then it leaves at the end of the stream
            try:
                arrived = time.perf_counter()
                body = await _body(request, self.most_bytes)
                chat = await asyncio.to_thread(lambda: parse(from_json(body)))
                found = await _Answer(service, chat, arrived).begin(request)
                streams = isinstance(found, Events)
                status = found.status_code
                return found
            finally:
                if not streams:
                    service.leave()
        except ApiError as err:
            status = err.status
            if status == GONE:
                service.metrics.cancelled.inc()
            raise
        finally:
            service.metrics.requests.labels(str(status)).inc()


class _Answer:
    """One request to answer, as a whole or as a stream."""

    def __init__(self, service: Service, chat: ChatRequest, arrived: float):
        self.service = service
        self.chat = chat
        self.arrived = arrived

    async def begin(self, request: Request) -> Response:
        """The answer; a stream once its first part is there, so that what cannot be answered has its status."""
        service = self.service
        run = await service.run_of(self.chat, self.arrived)
        writer = ChatWriter(service.pipe, service.name, self.chat, run)
        pieces = service.answer(self.chat, run)
        gone = asyncio.ensure_future(_gone(request))
        try:
            first = await _unless(gone, anext(pieces, None))
            if self.chat.stream:
                return Events(service, writer, first, pieces, run.arrived + service.limits.seconds)
            found = [] if first is None else [first]
            while (piece := await _unless(gone, anext(pieces, None))) is not None:
                found.append(piece)
            return JSONResponse(writer.whole(found))
        except BaseException:
            await pieces.aclose()
            raise
        finally:
            gone.cancel()


class Events(StreamingResponse):
    """An answer as server-sent events; a request that was let in leaves at its end, however it comes."""

    def __init__(
        self,
        service: Service,
        writer: ChatWriter,
        first: Piece | None,
        pieces: AsyncGenerator[Piece, None],
        deadline: float,
    ):
        super().__init__(self._chunks(writer, first, pieces), media_type="text/event-stream")
        self._service = service
        self._pieces = pieces
        self._deadline = deadline  # in seconds of perf_counter; for its reader, too
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; where the client goes away, what is left of it is not computed."""
        try:
            left = max(0.0, self._deadline - time.perf_counter()) + LAST_WORDS
            await asyncio.wait_for(super().__call__(scope, receive, send), left)
        except asyncio.TimeoutError:  # it reads nothing any more
            LOG.info("a stream was not read", extra={"fields": {"seconds": self._service.limits.seconds}})
        finally:
            if not self._ended:
                self._service.metrics.cancelled.inc()
            self._service.leave()
            await self._pieces.aclose()

    async def _chunks(
        self, writer: ChatWriter, first: Piece | None, pieces: AsyncGenerator[Piece, None]
    ) -> AsyncIterator[str]:
        yield _event(writer.first())
        if first is not None:
            yield _event(writer.chunk(first))
        try:
            async for piece in pieces:
                yield _event(writer.chunk(piece))
        except ApiError as err:
            yield _event(err.body)
        else:
            for chunk in writer.last():
                yield _event(chunk)
        yield DONE
        self._ended = True


async def _unless(gone: asyncio.Future[None], wanted: Awaitable[Any]) -> Any:
    """What is waited for, unless the client goes away before. Raises ApiError then."""
    task = asyncio.ensure_future(wanted)
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, ApiError):
        await task
    raise ApiError(GONE, "the client went away")


async def _gone(request: Request) -> None:
    """Until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most_bytes: int) -> bytes:
    """The whole body. Raises ApiError for one that is too long, or comes too slowly.

    What is beyond the limit is read and dropped for a while, since most clients read no answer before they have sent
    all of theirs.
    """
    parts = []
    found = 0

    async def read() -> None:
        nonlocal found
        async for part in request.stream():
            found += len(part)
            if found <= most_bytes:
                parts.append(part)
            elif found > DROPPED * most_bytes:
                break

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as err:
        message = f"the body took longer than {BODY_SECONDS:g} s, expected all of it sooner"
        raise invalid(message, status=408) from err
    except ClientDisconnect as err:
        raise ApiError(GONE, "the client went away") from err
    if found > most_bytes:
        raise invalid(f"the body is longer than {most_bytes} bytes, expected a smaller image", status=413)
    return b"".join(parts)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _pruning(service: Service) -> dict[str, Any]:
    """What the bundle's own pruning of pixels is, and which methods there are."""
    pixel = next((pruner for pruner in service.pipe.prune if isinstance(pruner, PixelPrune)), None)
    usual = pixel or PixelPrune()
    return {"methods": PRUNE_METHODS, "method": usual.method, "tau": usual.tau, "off": pixel is None}


def _model(service: Service) -> dict[str, Any]:
    manifest = service.pipe.manifest
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "ppexport",
        "ppexport": {
            "family": manifest.family,
            "precision": str(manifest.precision),
            "device": service.pipe.chosen,
            "context": service.pipe.context,
            **_pruning(service),
        },
    }
