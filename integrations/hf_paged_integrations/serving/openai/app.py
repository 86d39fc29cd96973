"""The app: the routes of OpenAI's interface, and those for the operator of the server."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from hf_paged import __version__
from hf_paged_integrations.serving.openai.answer import Answer
from hf_paged_integrations.serving.openai.errors import (
    ApiError,
    answer_api_error,
    answer_http_error,
    answer_invalid,
    as_api_error,
)
from hf_paged_integrations.serving.openai.gate import Gate
from hf_paged_integrations.serving.openai.responses import Form, dumped, usage
from hf_paged_integrations.serving.openai.schema import ChatRequest, CompletionRequest
from hf_paged_integrations.serving.openai.service import Service

Result = TypeVar("Result")
_PING_SECONDS = 15  # A comment keeps proxies from closing a stream that waits in the queue.
_LINE_END = "\n"  # Simple clients know no other.
_CLIENT_GONE = 499  # Only a log and the metrics get it.


def make_app(service: Service) -> FastAPI:
    """Make the ASGI app of a server.

    Parameters
    ----------
    service : Service
    """
    app = FastAPI(title="hf_paged", version=__version__, openapi_url=None)
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    _add_models(app, service)
    _add_health(app, service)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        answer, form = await service.chat(body, _tenant(request, service))
        return await _respond(request, answer, form, body)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        answer, form = await service.complete(body, _tenant(request, service))
        return await _respond(request, answer, form, body)

    return app


def _add_models(app: FastAPI, service: Service) -> None:
    model = {
        "id": service.settings.model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "hf_paged",
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        if service.is_draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        # In a thread: it waits for the pool.
        text = await asyncio.to_thread(generate_latest, service.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _tenant(request: Request, service: Service) -> str | None:
    """The tenant that the proxy names; None if no header was agreed on."""
    name = service.settings.tenant_header
    if name is None:
        return None
    tenant = request.headers.get(name)
    if not tenant:
        raise ApiError(400, f"the header {name} is missing: the proxy in front of this server must set it")
    return tenant


async def _respond(request: Request, answer: Answer, form: Form, body: ChatRequest | CompletionRequest) -> Response:
    if body.stream:
        return _AnswerStream(answer, form, body.includes_usage)
    try:
        choices = await _unless_gone(request, answer.whole())
    finally:
        answer.abort()
    if choices is None:
        return Response(status_code=_CLIENT_GONE)
    return JSONResponse(form.whole(choices, usage(answer.prompt_tokens, answer.completion_tokens)))


class _AnswerStream(EventSourceResponse):
    """Streams an answer. When the client goes away, even before the first chunk, the request is ended."""

    def __init__(self, answer: Answer, form: Form, includes_usage: bool):
        self._answer = answer
        super().__init__(_events(answer, form, includes_usage), ping=_PING_SECONDS, sep=_LINE_END)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.abort()


async def _events(answer: Answer, form: Form, includes_usage: bool) -> AsyncIterator[ServerSentEvent]:
    """The chunks of a stream; of one that fails, at last its error."""
    try:
        for chunk in form.begin(answer.num_choices):
            yield _event(dumped(chunk))
        async with contextlib.aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                for chunk in form.chunk(piece):
                    yield _event(dumped(chunk))
        if includes_usage:
            total = usage(answer.prompt_tokens, answer.completion_tokens)
            yield _event(dumped(form.usage_chunk(total)))
    except Exception as error:
        yield _event(dumped(as_api_error(error).body))
    yield _event("[DONE]")


def _event(data: str) -> ServerSentEvent:
    return ServerSentEvent(data, sep=_LINE_END)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Wait for work; if the client goes away before, end it and return None."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
