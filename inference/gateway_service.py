"""The OpenAI-compatible HTTP gateway of a daemon; ``open_gateway`` starts it.

A request becomes a session at the model's first stage; the last stage sends the tokens
here by RPC. No tensor comes near this process.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fabric.core.errors import ConfigError, FabricError
from fabric.core.ids import PeerId
from fabric.net.rpc_api import Rpc
from fabric.net.tasks import collapse_group
from inference import openai_api as api
from inference.config import InferenceConfig
from inference.messages import Finish, ServedModel
from inference.service import ServeService
from inference.session_service import GatewaySessions, Generation
from inference.text import TextStream

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]


Answer = Callable[[Scope, Receive, Send], Awaitable[None]]
"""What Starlette runs: a response, or a :class:`Reply`."""
Handler = Callable[[Request], Awaitable[Answer]]


class Gateway:
    """HTTP handlers; one per daemon."""

    def __init__(self, config: InferenceConfig, sessions: GatewaySessions) -> None:
        self._config = config
        self._sessions = sessions

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self._guard(self._models)),
                Route("/v1/models/{name:path}", self._guard(self._model)),
                Route(
                    "/v1/chat/completions",
                    self._guard(partial(self._generate, chat=True)),
                    methods=["POST"],
                ),
                Route(
                    "/v1/completions",
                    self._guard(partial(self._generate, chat=False)),
                    methods=["POST"],
                ),
            ],
            exception_handlers={404: _no_route, 405: _no_route},
        )

    def _guard(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Answer:
            try:
                self._authorize(request)
                return await handler(request)
            except FabricError as exc:
                return _error(api.error_of(exc))

        return guarded

    def _authorize(self, request: Request) -> None:
        token = self._config.gateway_token
        sent = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            raise api.ApiError(401, "missing or wrong token", code="invalid_api_key")

    async def _models(self, request: Request) -> Response:
        return JSONResponse(api.model_list(await self._sessions.models()))

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self._find(name)
        return JSONResponse(api.model_entry(name))

    async def _find(self, name: str) -> ServedModel:
        model = (await self._sessions.models()).get(name)
        if model is None:
            raise api.ApiError(
                404,
                f"the model {name!r} does not exist here",
                param="model",
                code="model_not_found",
            )
        return model

    async def _generate(self, request: Request, *, chat: bool) -> Answer:
        wanted = api.parse_untrusted(await self._body(request), chat=chat)
        model = await self._find(wanted.model)
        sampling = api.sampling_of(
            wanted, model.context_tokens, secrets.randbelow(2**53)
        )
        generation = await self._sessions.start(model, wanted.prompt, sampling)
        replies = api.Replies(wanted, generation.session, int(time.time()))
        return Reply(generation, wanted, replies)

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._config.max_body_bytes:
                raise api.ApiError(413, f"body above {self._config.max_body_bytes} B")
        return bytes(body)


class Reply:
    """Answers while tokens come, and ends the session when the client goes away."""

    def __init__(
        self,
        generation: Generation,
        request: api.GenerationRequest,
        replies: api.Replies,
    ) -> None:
        self._generation = generation
        self._request = request
        self._replies = replies
        self._text = TextStream(request.stop)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole answer, or its events."""
        try:
            with collapse_group():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
                    if self._request.stream:
                        await self._send_events(send)
                    else:
                        await (await self._whole())(scope, receive, send)
                    nursery.cancel_scope.cancel()
        finally:
            await self._generation.aclose()

    async def _whole(self) -> Response:
        text, finish = "", "stop"
        try:
            while not self._text.stopped:
                piece, finish = await self._next()
                text += piece
                if finish:
                    break
        except FabricError as exc:
            return _error(api.error_of(exc))
        body = self._replies.whole(text, _finish(finish), self._generation.num_tokens)
        return Response(body, media_type="application/json")

    async def _send_events(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
        )
        try:
            await self._send_pieces(partial(_send_part, send))
        except FabricError as exc:
            # The status is long gone: the error is the last event.
            await _send_part(send, api.event(api.error_of(exc).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pieces(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        await send(self._replies.piece("", first=True))
        finish = ""
        while not finish and not self._text.stopped:
            piece, finish = await self._next()
            if piece:
                await send(self._replies.piece(piece))
        await send(self._replies.piece("", _finish(finish)))
        if self._request.include_usage:
            await send(self._replies.usage(self._generation.num_tokens))
        await send(api.DONE)

    async def _next(self) -> tuple[str, str]:
        """Return text that is certain, and the finish at the end."""
        token = await self._generation.next_token()
        text = self._text.feed(token.token) if token.token >= 0 else ""
        if token.finish:
            text += self._text.finish()
        return text, token.finish


@asynccontextmanager
async def open_gateway(
    config: InferenceConfig, peer_id: PeerId, rpc: Rpc, service: ServeService
) -> AsyncIterator[str]:
    """Serve HTTP while the block lasts; yields the base URL ("http://127.0.0.1:80").

    Raises:
        ConfigError: a public address without a token, or the port is taken.
    """
    if not config.gateway_token and config.gateway_host not in _LOOPBACK:
        raise ConfigError(
            f"gateway on {config.gateway_host} without a token",
            next_step="set inference.gateway_token, or listen on 127.0.0.1",
        )
    sessions = GatewaySessions(config, peer_id, rpc, service)
    sessions.register()
    http = HypercornConfig()
    host = (
        f"[{config.gateway_host}]"
        if ":" in config.gateway_host
        else config.gateway_host
    )
    http.bind = [f"{host}:{config.gateway_port}"]
    http.accesslog = http.errorlog = None
    http.graceful_timeout = 0.5
    app = Gateway(config, sessions).app()
    with collapse_group():
        async with trio.open_nursery() as nursery:
            try:
                urls = await nursery.start(
                    partial(serve, app, http, shutdown_trigger=trio.sleep_forever)
                )
            except OSError as exc:
                raise ConfigError(f"gateway on {http.bind[0]}: {exc}") from exc
            yield urls[0]
            nursery.cancel_scope.cancel()


_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


async def _no_route(request: Request, error: Exception) -> Response:
    return _error(
        api.ApiError(
            getattr(error, "status_code", 404),
            f"no route {request.method} {request.url.path}",
            code="unknown_url",
        )
    )


def _error(error: api.ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def _finish(finish: str) -> Finish:
    return "length" if finish == "length" else "stop"
