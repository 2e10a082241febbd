"""The gateway's sessions: started at a first stage, fed by a last stage."""

from __future__ import annotations

import secrets
from contextlib import suppress

import trio

from fabric.core.errors import (
    FabricError,
    PeerTimeout,
    RemoteProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId
from fabric.net.rpc_api import Rpc
from inference.config import InferenceConfig
from inference.messages import (
    CODEC,
    METHOD_CANCEL,
    METHOD_MODELS,
    METHOD_SUBMIT,
    METHOD_TOKENS,
    AskModels,
    Cancel,
    Models,
    Sampling,
    ServedModel,
    SessionToken,
    Submit,
    Taken,
    TokenBatch,
)
from inference.service import ServeService

_ASK_SECONDS = 1.0
_SUBMIT_SECONDS = 10.0
_CANCEL_SECONDS = 2.0
_MODELS_FRESH_SECONDS = 2.0
_TAKEN = CODEC.encode(Taken())


class GatewaySessions:
    """Sessions that this daemon's HTTP clients wait for.

    Args:
        config: Limits.
        peer_id: This daemon.
        rpc: Calls to other daemons.
        service: This daemon's own stages.
    """

    def __init__(
        self, config: InferenceConfig, peer_id: PeerId, rpc: Rpc, service: ServeService
    ) -> None:
        self._config = config
        self._peer_id = peer_id
        self._rpc = rpc
        self._service = service
        self._open: dict[str, Generation] = {}
        self._asked: dict[str, ServedModel] = {}
        self._asking = trio.Lock()
        self._asked_at = -_MODELS_FRESH_SECONDS

    def register(self) -> None:
        """Take tokens from now on, from other daemons and from this one."""
        self._rpc.register(METHOD_TOKENS, self._on_tokens)
        self._service.deliver_to(self.take)

    def count(self) -> int:
        """Return the number of open sessions."""
        return len(self._open)

    async def models(self) -> dict[str, ServedModel]:
        """Return what can be served, by name: here, or at a peer that is known."""
        async with self._asking:  # whoever comes meanwhile waits for the answers
            if trio.current_time() - self._asked_at >= _MODELS_FRESH_SECONDS:
                found: dict[str, ServedModel] = {}
                async with trio.open_nursery() as nursery:
                    others = self._rpc.connected().union(self._service.servers())
                    for peer in others - {self._peer_id}:
                        nursery.start_soon(self._ask, peer, found)
                self._asked, self._asked_at = found, trio.current_time()
        return self._asked | {model.name: model for model in self._service.models()}

    async def start(
        self, model: ServedModel, prompt: tuple[int, ...], sampling: Sampling
    ) -> Generation:
        """Submit a session; the caller closes it.

        Raises:
            ResourceExhausted: too many requests here.
            Unavailable: the first stage is gone.
            RemoteRefused, ConfigError: the first stage declines.
        """
        if len(self._open) >= self._config.max_requests:
            raise ResourceExhausted("too many requests at this gateway", code="E_BUSY")
        request = Submit(model.job, secrets.token_hex(16), prompt, sampling)
        generation = Generation(self, model, request.session, sampling.max_tokens)
        self._open[request.session] = generation
        try:
            with trio.fail_after(_SUBMIT_SECONDS):
                await self._submit(model.first_stage, request)
        except trio.TooSlowError as exc:
            await generation.aclose()
            raise PeerTimeout("the first stage did not answer") from exc
        except BaseException:
            await generation.aclose()
            raise
        return generation

    def take(self, batch: TokenBatch) -> None:
        """Give tokens to their sessions; those of closed ones are dropped."""
        for token in batch.tokens:
            generation = self._open.get(token.session)
            if generation is not None:
                generation.feed(token)

    async def next_token(
        self, tokens: trio.MemoryReceiveChannel[SessionToken]
    ) -> SessionToken:
        """Return the next token, within the configured silence."""
        try:
            with trio.fail_after(self._config.token_timeout_seconds):
                return await tokens.receive()
        except trio.TooSlowError as exc:
            raise PeerTimeout("no token from the last stage") from exc

    async def close(self, model: ServedModel, session: str, *, ended: bool) -> None:
        """Forget a session; tell the first stage unless it has ended."""
        self._open.pop(session, None)
        if ended:
            return
        request = Cancel(model.job, session)
        # Shielded: a client that went away has cancelled us, and its session must not
        # hold a slot of every stage.
        with trio.CancelScope(shield=True), trio.move_on_after(_CANCEL_SECONDS):
            with suppress(FabricError):
                if model.first_stage == self._peer_id:
                    await self._service.stop(self._peer_id, request)
                else:
                    await self._rpc.call(
                        model.first_stage, METHOD_CANCEL, CODEC.encode(request)
                    )

    async def _submit(self, first_stage: PeerId, request: Submit) -> None:
        if first_stage == self._peer_id:
            await self._service.submit(self._peer_id, request)
        else:
            await self._rpc.call(first_stage, METHOD_SUBMIT, CODEC.encode(request))

    async def _ask(self, peer: PeerId, found: dict[str, ServedModel]) -> None:
        request = CODEC.encode(AskModels())
        with trio.move_on_after(_ASK_SECONDS), suppress(FabricError):
            answer = CODEC.decode_untrusted(
                await self._rpc.call(peer, METHOD_MODELS, request)
            )
            if isinstance(answer, Models):
                found.update((model.name, model) for model in answer.models)

    def _on_tokens(self, caller: PeerId, request: bytes) -> bytes:
        message = CODEC.decode_untrusted(request)
        if not isinstance(message, TokenBatch):
            raise RemoteProtocolError(f"{type(message).__name__} to serve.tokens")
        self.take(message)
        return _TAKEN


class Generation:
    """Tokens of one session, in order."""

    def __init__(
        self, owner: GatewaySessions, model: ServedModel, session: str, max_tokens: int
    ) -> None:
        self.session = session
        self.num_tokens = 0
        self._owner = owner
        self._model = model
        self._ended = False
        self._max_tokens = max_tokens
        self._next = 0
        # Tokens ahead of a missing one; never more than the session may generate.
        self._early: dict[int, SessionToken] = {}
        # All that the session may ever generate, and an end: feeding never waits.
        self._send, self._receive = trio.open_memory_channel[SessionToken](
            max_tokens + 1
        )

    def feed(self, token: SessionToken) -> None:
        """Take in a token, in any order: after a loss two stages may send for a while.

        The first stage repeats what a lost last stage may not have delivered.
        """
        if token.finish == "error":
            self._put(token)
        elif self._next <= token.index < self._max_tokens:
            self._early.setdefault(token.index, token)
            while (ready := self._early.pop(self._next, None)) is not None:
                self._next += 1
                self._put(ready)

    def _put(self, token: SessionToken) -> None:
        with suppress(trio.WouldBlock, trio.ClosedResourceError):
            self._send.send_nowait(token)

    async def next_token(self) -> SessionToken:
        """Return the next token or the end; a token may be the last one too.

        Raises:
            PeerTimeout: nothing came.
            Unavailable: the session failed.
        """
        token = await self._owner.next_token(self._receive)
        if token.finish == "error":
            raise Unavailable("the session broke in the mesh", code="E_SESSION_LOST")
        self._ended = token.finish != ""
        if token.token >= 0:
            self.num_tokens += 1
        return token

    async def aclose(self) -> None:
        """Forget the session; an unfinished one is cancelled at the first stage."""
        self._receive.close()
        self._send.close()
        await self._owner.close(self._model, self.session, ended=self._ended)
