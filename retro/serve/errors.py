"""Errors as OpenAI's API shows them: a status, and an object that says what was wrong."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from retro.errors import ConfigError, CorpusError, FormatError, MismatchError, RetroError, StorageError
from retro.serve.gate import BusyError, StoppingError

logger = logging.getLogger(__name__)
_TYPES = ("str", "int", "float", "bool")
TIMED_OUT = "the request took longer than this server allows ({seconds:g} s): ask for less, or try again later"


class ErrorObject(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = Field(description="The field of the request that was wrong.")
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorObject


class ApiError(RetroError):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole reply."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def api_error(error: Exception, *, timeout_s: float = 0.0) -> ApiError:
    """The error that a client is shown; of what is not its fault it learns nothing more than that."""
    if isinstance(error, ApiError):
        return error
    unavailable = "the index cannot be opened at present: the server's log says why"
    unwritable = "the index cannot be changed at present, and was not: the server's log says why"
    kinds: list[tuple[Any, int, str, str | None, dict[str, str]]] = [
        (BusyError, 429, str(error), "rate_limit_exceeded", {"Retry-After": "1"}),
        (StoppingError, 503, str(error), "stopping", {"Retry-After": "5", "Connection": "close"}),
        (TimeoutError, 504, TIMED_OUT.format(seconds=timeout_s), "timeout", {"x-should-retry": "false"}),
        (ConfigError | CorpusError, 400, str(error), None, {}),
        (FormatError | MismatchError, 503, unavailable, "index_unavailable", {}),
        (StorageError, 503, unwritable, "index_unwritable", {}),
    ]
    for kind, status, message, code, headers in kinds:
        if isinstance(error, kind):
            return ApiError(status, message, code=code, headers=headers)
    return ApiError(500, "the server failed: its log says why", code="internal_error")


def add_error_handlers(app: FastAPI, timeout_s: float) -> None:
    def of_ours(_: Request, error: Exception) -> Response:
        shown = api_error(error, timeout_s=timeout_s)
        if shown.code in ("index_unavailable", "index_unwritable", "internal_error"):
            logger.error("A request failed", exc_info=error)
        return shown.response()

    def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _refusal(error).response()

    def of_starlette(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    for kind in (RetroError, TimeoutError):
        app.add_exception_handler(kind, of_ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, of_starlette)


def _place(found: Any) -> str:
    """The field, without the names of the types that were tried for it."""
    parts = list(found["loc"][1:])
    last = [str(parts.pop())] if parts and found["type"] == "extra_forbidden" else []
    named = [str(part) for part in parts if isinstance(part, int) or (part.isidentifier() and part not in _TYPES)]
    return ".".join(named + last)[:200]


def _refusal(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, without the values that were sent."""
    problems = []
    param = None
    for found in error.errors()[:3]:
        place = _place(found)
        param = param or place or None
        message = found["msg"].removeprefix("Value error, ")
        problems.append(f"{place}: {message}" if place else message)
    return ApiError(400, "; ".join(problems) or "the request is malformed", param=param)
