"""Gate: what is asked of every request before its body is read: a key, a size, and a server that is open."""

import hmac

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_paged_integrations.serving.openai.errors import ApiError, as_api_error, draining
from hf_paged_integrations.serving.openai.service import Service

_GUARDED = "/v1"
_TOO_LARGE = "the body is larger than {} bytes: send less"


class Gate:
    """Refuses requests under ``/v1`` without the key, while the server shuts down, and with too large a body.

    Parameters
    ----------
    app : ASGIApp
    service : Service
    """

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service
        key = service.settings.api_key
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_GUARDED):
            await self._app(scope, receive, send)
            return
        most, length = self._service.settings.max_body_bytes, 0

        async def limited() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > most:
                raise HTTPException(413, _TOO_LARGE.format(most))  # FastAPI makes a 400 of any other.
            return message

        counted = _Counted(send)
        try:
            self._check(Headers(scope=scope), most)
            await self._app(scope, limited, counted)
        except Exception as error:
            if counted.status is not None:  # A part of another response is sent.
                raise
            await as_api_error(error).response()(scope, receive, counted)
        finally:
            self._service.metrics.requests.labels(status=str(counted.status or 499)).inc()

    def _check(self, headers: Headers, most: int) -> None:
        given = headers.get("authorization", "").encode("latin-1")
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        if self._service.is_draining:
            raise draining()
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise ApiError(413, _TOO_LARGE.format(most), code="request_too_large")


class _Counted:
    """Sends on, and notes the status of the response."""

    def __init__(self, send: Send):
        self._send, self.status = send, None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
