"""Errors as OpenAI's API has them: a status, and an object that says what was wrong."""

from __future__ import annotations

from typing import Any

from ..models.errors import BackendError, ImageError, PpexportError, RequestError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """Something to tell a client. ``param``: the field of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str = INVALID,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(
            message.encode("utf-8", "backslashreplace").decode()
        )  # half a surrogate cannot be sent
        self.status = status
        self.param = param
        self.kind = kind
        self.code = code
        self.retry_after = retry_after  # seconds

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        found = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": found}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def invalid(message: str, param: str | None = None, status: int = 400, code: str | None = None) -> ApiError:
    """The client's mistake."""
    return ApiError(status, message, param, code=code)


def busy(message: str, seconds: int) -> ApiError:
    """Too much at once."""
    return ApiError(429, message, None, "rate_limit_error", "queue_full", seconds)


def closing(message: str) -> ApiError:
    """The server takes nothing more."""
    return ApiError(503, message, None, "server_error", "draining", 1)


def of_product(err: PpexportError) -> ApiError:
    """What the rest of ppexport raised while it looked at a request or answered it."""
    if isinstance(err, ImageError):
        return invalid(str(err), "messages", code="invalid_image")
    if isinstance(err, RequestError):
        return invalid(str(err))
    kind = "backend_error" if isinstance(err, BackendError) else None
    return ApiError(500, str(err), None, "server_error", kind)
