"""The endpoints, as a Starlette application."""

from __future__ import annotations

import hmac
import mmap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from localrun.arguments import shown
from localrun.serve import anthropic, bodies, openai, responses
from localrun.serve.bodies import Chat, Completion, Conversation, Text, Tokens
from localrun.serve.errors import APIError, failed, invalid, unsupported
from localrun.serve.kept_responses import KeptResponses
from localrun.serve.metrics import metrics_text
from localrun.serve.openai import ChatForm, Form, TextForm
from localrun.serve.origins import OriginCheck
from localrun.serve.page_files import is_page, page_routes
from localrun.serve.service import ClientGoneError, Replies, Service, while_connected, with_signs_of_life

MOST_BODY_BYTES = 1 << 24  # of a request: more than any context holds; several may come at once
RESPONSES = "/v1/responses"
PING = b": ping\n\n"  # a comment, which clients pass over

Endpoint = Callable[[Request], Awaitable[Response]]


def application(
    service: Service, api_key: str | None = None, *, origins: Sequence[str] = (), is_local: bool = False
) -> Starlette:
    """The server of a model.

    Args:
        api_key: what clients have to send, as a bearer token or x-api-key; None for nothing.
        origins: whose pages may use it, in a browser; without a key only its own otherwise.
        is_local: whether it listens on this machine alone.
    """
    endpoints = Endpoints(service)
    routes = [
        *page_routes(),
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
        Route("/v1/models", endpoints.models),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completion, methods=["POST"]),
        Route(RESPONSES, endpoints.response, methods=["POST"]),
        Route(f"{RESPONSES}/{{id}}", endpoints.kept_response, methods=["GET", "DELETE"]),
        Route(anthropic.PATH, endpoints.message, methods=["POST"]),
        Route(f"{anthropic.PATH}/count_tokens", endpoints.count_tokens, methods=["POST"]),
        Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        Route("/apply-template", endpoints.apply_template, methods=["POST"]),
    ]
    handlers: Mapping[Any, Any] = {
        APIError: _refusal,
        HTTPException: _http_error,
        ClientGoneError: _nobody,
        ClientDisconnect: _nobody,
        Exception: _own_error,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    if api_key is not None:
        app.add_middleware(KeyCheck, api_key=api_key)
    else:
        app.add_middleware(OriginCheck, allowed=origins, is_local=is_local)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    return app


class Endpoints:
    """A method for each path."""

    def __init__(self, service: Service):
        self._service, self._started = service, int(time.time())
        self._kept = KeptResponses()

    async def health(self, request: Request) -> Response:
        """GET /health: it is there."""
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: counters in Prometheus' text format."""
        return Response(metrics_text(self._service.scheduler), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one that is loaded."""
        model = {
            "id": self._service.name,
            "object": "model",
            "created": self._started,
            "owned_by": "localrun",
            "meta": {
                "n_ctx": self._service.engine.ctx,
                "n_vocab": self._service.engine.model.vocab_size,
                "has_chat_template": self._service.template is not None,
            },
        }
        return _json({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions (OpenAI)."""
        body = await _body(request, Chat)
        replies, parsers = await self._service.chat(body)
        return await self._answer(request, body, replies, ChatForm(parsers))

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions (OpenAI): texts or ids go on as they are."""
        body = await _body(request, Completion)
        body.check()
        sampling = await self._service.sampling(body)
        prompts = [await self._service.text_ids(prompt) for prompt in body.prompts()]
        replies = self._service.replies(prompts, body.choices, sampling, body.limit, body.stops)
        return await self._answer(request, body, replies, TextForm())

    async def _answer(self, request: Request, body: bodies.Generation, replies: Replies, form: Form) -> Response:
        if body.stream:
            progress = bool(body.return_progress)
            chunks = openai.chunks(replies, form, self._service.name, body.includes_usage, progress)
            return EventStream(chunks, replies.cancel)
        return await _whole(request, replies, openai.whole(replies, form, self._service.name))

    async def response(self, request: Request) -> Response:
        """POST /v1/responses (OpenAI), kept unless store is false."""
        body = await _body(request, responses.Request)
        earlier = self._earlier(body.previous_response_id)
        replies, (parser,) = await self._service.chat(body.chat(earlier))
        keep = None if body.store is False else partial(self._kept.add, given=[*earlier, *body.items])
        answer = responses.Answer(body, self._service.name, keep)
        if body.stream:
            wire = Wire(PING, b"", True, answer.failed)
            return EventStream(responses.events(replies, parser, answer), replies.cancel, wire)
        return await _whole(request, replies, responses.whole(replies, parser, answer))

    def _earlier(self, id: str | None) -> list[dict[str, Any]]:
        """The conversation that a request goes on from. Raises APIError if there is none of that id."""
        items = [] if id is None else self._kept.items(id)
        if items is None:
            message = f"Previous response with id {shown(id)} not found: it was not stored, or is not kept any more"
            raise invalid(message, "previous_response_id", "previous_response_not_found")
        return items

    async def kept_response(self, request: Request) -> Response:
        """GET or DELETE /v1/responses/ID: one that is kept; 404 if it is not."""
        id = request.path_params["id"]
        if request.query_params.get("stream") == "true":
            raise unsupported("stream", "a stream of a response that is over")
        if request.method == "DELETE":
            document = {"id": id, "object": "response", "deleted": True} if self._kept.delete(id) else None
        else:
            document = self._kept.document(id)
        if document is None:
            raise APIError(404, f"Response with id {shown(id)} not found: it was not stored, or is not kept any more")
        return _json(document)

    async def message(self, request: Request) -> Response:
        """POST /v1/messages (Anthropic)."""
        body = await _body(request, anthropic.Request)
        replies, (parser,) = await self._service.chat(body.chat())
        asked = (replies, parser, self._service.name, body.stop_sequences or ())
        if body.stream:
            return EventStream(anthropic.events(*asked), replies.cancel, ANTHROPIC)
        return await _whole(request, replies, anthropic.whole(*asked))

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens (Anthropic)."""
        body = await _body(request, anthropic.Counted)
        return _json({"input_tokens": len(await self._service.chat_ids(body.chat()))})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: a text's ids."""
        body, tokenizer = await _body(request, Text), self._service.engine.tokenizer
        ids = await self._service.in_thread(
            lambda: tokenizer.encode(body.content, add_special=body.add_special, parse_special=body.parse_special)
        )
        return _json({"tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: ids' text, control tokens as they are spelled."""
        body, tokenizer = await _body(request, Tokens), self._service.engine.tokenizer
        text = await self._service.in_thread(lambda: tokenizer.decode(body.tokens, special=True))
        return _json({"content": text})

    async def apply_template(self, request: Request) -> Response:
        """POST /apply-template: the text that a conversation becomes."""
        return _json({"prompt": await self._service.chat_text(await _body(request, Conversation))})


@dataclass(frozen=True)
class Wire:
    """How a protocol writes server-sent events.

    Attributes:
        ping: sent while there is nothing to say, in the form that the protocol's clients know.
        end: after the last event.
        is_named: events have a name, their type.
        error: the body of one.
    """

    ping: bytes
    end: bytes
    is_named: bool
    error: Callable[[APIError], dict[str, Any]]

    def event(self, document: dict[str, Any]) -> bytes:
        """A document as an event."""
        name = f"event: {document['type']}\n".encode() if self.is_named else b""
        return name + b"data: " + msgspec.json.encode(document) + b"\n\n"


OPENAI = Wire(PING, b"data: [DONE]\n\n", False, lambda error: error.body)
ANTHROPIC = Wire(b'event: ping\ndata: {"type":"ping"}\n\n', b"", True, anthropic.error_body)


class EventStream(Response):
    """Server-sent events: a document each. The work ends when the client goes.

    Args:
        cancel: called in the end, however it comes.
        wire: how the protocol writes events.
    """

    def __init__(self, documents: AsyncIterator[dict[str, Any]], cancel: Callable[[], None], wire: Wire | None = None):
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._documents, self._cancel, self._wire = documents, cancel, wire or OPENAI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with suppress(ClientGoneError, OSError):
                await while_connected(receive, self._send_all(send))
        finally:
            self._cancel()

    async def _send_all(self, send: Send) -> None:
        wire = self._wire

        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async for document in with_signs_of_life(self._documents):
                await write(wire.ping if document is None else wire.event(document))
            await write(wire.end)
        except APIError as error:  # the status has gone out already
            await write(wire.event(wire.error(error)))
        await write(b"", more=False)


class KeyCheck:
    """Refuses requests that lack the key."""

    def __init__(self, app: Any, api_key: str):
        self._app, self._key = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]) and not self._is_known(dict(scope["headers"])):
            error = APIError(401, "this server needs an API key", kind="authentication_error", code="invalid_api_key")
            await _error(error, scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return hmac.compare_digest(given, self._key)


def _is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path == "/health" or is_page(path)


async def _body(request: Request, kind: type[bodies.Body]) -> bodies.Body:
    """The request's body. Raises APIError if it is too large, or not of this kind."""
    announced, n_bytes = request.headers.get("content-length", ""), 0
    _check_size(int(announced) if announced.isdecimal() else 0)
    # Memory of its own, of which no more is there than is written, and which goes back to the system: the heap would
    # keep what the largest bodies took that ever came at once.
    with closing(mmap.mmap(-1, MOST_BODY_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as data:
        async for piece in request.stream():
            _check_size(n_bytes + len(piece))
            data[n_bytes : n_bytes + len(piece)] = piece
            n_bytes += len(piece)
        with memoryview(data) as whole, whole[:n_bytes] as body:
            return bodies.read(body, kind)


async def _whole(request: Request, replies: Replies, answer: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """A whole answer. The work for it ends when the client goes."""
    try:
        return _json(await while_connected(request.receive, answer))
    finally:
        replies.cancel()


def _check_size(n_bytes: int) -> None:
    if n_bytes > MOST_BODY_BYTES:
        raise APIError(413, f"the body has more than {MOST_BODY_BYTES} bytes", code="request_too_large")


def _json(document: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), status, headers, "application/json")


def _error(error: APIError, path: str) -> Response:
    body = anthropic.error_body(error) if path.startswith(anthropic.PATH) else error.body
    return _json(body, error.status, error.headers)


async def _refusal(request: Request, error: APIError) -> Response:
    return _error(error, request.url.path)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """No such path or method."""
    return _error(APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"), request.url.path)


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's status for it; nobody reads it


async def _own_error(request: Request, error: Exception) -> Response:
    return _error(failed(f"internal error, please report it: {type(error).__name__}: {error}"), request.url.path)
