"""Errors as OpenAI's interface states them: ``{"error": {"message", "type", "param", "code"}}``."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hf_paged.errors import OutOfBlocksError
from hf_paged_integrations.serving.async_engine import EngineClosedError, QueueFullError

logger = logging.getLogger("hf_paged.serve")
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# Of pydantic; the first two are our own.
UNSUPPORTED, WRONG = "unsupported_parameter", "invalid_value"
_KINDS = {"str", "int", "list"}
_UNKNOWN, _MISSING, _NO_JSON = "extra_forbidden", "missing", "json_invalid"


class ApiError(Exception):
    """An error that a client gets to see.

    Parameters
    ----------
    status : int
        The HTTP status.
    message : str
    code, param : str or None
        OpenAI's name of the mistake, and the parameter that it is in.
    headers : mapping of str to str or None
        Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        super().__init__(message)

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The error as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response to a request that ends with this error."""
        return JSONResponse(self.body, self.status, self.headers)


def draining() -> ApiError:
    """The error of requests that come while the server shuts down, and of those that it ends then."""
    return ApiError(503, "the server is shutting down: send this request again later", headers={"Retry-After": "5"})


def as_api_error(error: BaseException) -> ApiError:
    """State an error of a request to its client. One that is none of the client's business is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        text = f"the queue is full: {error.waiting} requests wait and {error.running} run; send this one again later"
        return ApiError(429, text, code="rate_limit_exceeded", headers={"Retry-After": "1"})
    if isinstance(error, EngineClosedError):
        return draining()
    if isinstance(error, OutOfBlocksError):
        text = f"the prompt and its answer need {error.needed} blocks of the KV cache, which has {error.total}"
        return ApiError(400, f"{text}: shorten the prompt, or ask for fewer tokens", code="context_length_exceeded")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed to answer ({type(error).__name__}); its log says why")


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    """Handle an error of a route."""
    return as_api_error(error).response()


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Handle an error of the routing: there is no such URL, or it does not take the method."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, text, headers=error.headers).response()


async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """Handle a body that is not what the route takes. Of several mistakes one is named, as OpenAI does."""
    assert isinstance(error, RequestValidationError)
    # Of a value that may be of several kinds, the mistake that is deepest in it belongs to the kind that was meant.
    return _of_mistake(max(error.errors(), key=lambda mistake: len(mistake["loc"]))).response()


def _of_mistake(mistake: Mapping[str, Any]) -> ApiError:
    """The error for one mistake that pydantic has found."""
    kind, param = mistake["type"], _path(mistake["loc"][1:])  # The first part of the place is "body".
    if kind == _NO_JSON:
        return ApiError(400, f"the body is no JSON: {mistake.get('ctx', {}).get('error', mistake['msg'])}")
    if kind == _UNKNOWN:
        return ApiError(400, f"Unrecognized request argument supplied: {param}", code="unknown_parameter", param=param)
    if kind == UNSUPPORTED:
        return ApiError(400, f"{param} is not supported by this server: leave it out", code=UNSUPPORTED, param=param)
    if kind == WRONG:  # It says itself which parameters it is about.
        return ApiError(400, mistake["msg"], code=WRONG)
    if kind == _MISSING:
        text = "the body must be a JSON object" if param is None else f"you must provide {param}"
        return ApiError(400, text, code="missing_required_parameter", param=param)
    text = f"{param or 'the body'}: {mistake['msg']}; got {_short(mistake.get('input'))}"
    return ApiError(400, text, code=WRONG, param=param)


def _path(parts: Sequence[int | str]) -> str | None:
    """The name of a parameter: ``messages[0].content``. Among the parts are kinds that a value was tried as."""
    name = ""
    for part in parts:
        if isinstance(part, str) and (part in _KINDS or not part.isidentifier()):
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
