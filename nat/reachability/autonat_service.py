"""Answer those who ask whether they can be reached: AutoNAT v2, and v1 for others."""

from __future__ import annotations

import secrets
from typing import Protocol

import trio

from fabric.core.errors import NoRoute, RemoteProtocolError, Unavailable
from fabric.core.ids import PeerId
from fabric.core.protobuf import delimited
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.delimited import MessageStream
from fabric.net.traversal_api import TraversalHost
from nat.addresses import endpoint_of
from nat.reachability.autonat import AutonatServer, Target
from nat.reachability.autonat_messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_DIAL_BACK,
    PROTOCOL_DIAL_REQUEST,
    PROTOCOL_V1,
    DialData,
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialStatus,
    DialV1,
    ResponseStatus,
    ResponseV1,
    StatusV1,
    decode_dial_v1_untrusted,
    decode_v2_untrusted,
    encode_dial_back,
    encode_response_v1,
    encode_v2,
)
from nat.reachability.config import AutonatConfig

E_LIMIT = "E_AUTONAT_LIMIT"
E_TARGET = "E_AUTONAT_TARGET"


class DialBackPort(Protocol):
    """One connection as nobody: :class:`fabric.net.libp2p_dialback.DialBack`."""

    async def reach(self, peer: PeerId, ip: str, port: int) -> None:
        """Return if ``peer`` answers there; NoRoute if not."""
        ...

    async def tell(
        self, peer: PeerId, ip: str, port: int, protocol: str, message: bytes
    ) -> bytes:
        """Send ``message`` there; NoRoute or Unavailable if it did not get across."""
        ...


class AutonatService:
    """Serves both versions on ``host`` from its making on.

    Args:
        host: Whose streams.
        dial_back: Dials for others.
        config: Limits.
        counters: Where refusals are counted.
    """

    def __init__(
        self,
        host: TraversalHost,
        dial_back: DialBackPort,
        config: AutonatConfig,
        counters: Counters,
    ) -> None:
        self._host = host
        self._dial_back = dial_back
        self._config = config
        self._counters = counters
        rng = secrets.SystemRandom()
        self._core = AutonatServer(config, rng.randrange)
        self._limiter = trio.CapacityLimiter(config.max_dials)
        if config.serve:
            host.set_handler(PROTOCOL_DIAL_REQUEST, self._serve)
            host.set_handler(PROTOCOL_V1, self._serve_v1)

    def _asker_ip(self, peer: PeerId) -> str | None:
        """Return where ``peer`` is seen, on a socket of its own.

        A request that came over a relay is validated by another, direct connection, or
        refused: nobody observes the asker on a relay (v1, "MUST NOT accept").
        """
        for info in self._host.connections(peer):
            end = endpoint_of(info.remote)
            if info.kind == "direct" and end is not None:
                return str(end[0])
        return None

    async def _serve(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        """Answer one v2 request."""
        messages = MessageStream(stream, MAX_MESSAGE_BYTES)
        with trio.move_on_after(self._config.request_seconds):
            request = decode_v2_untrusted(await messages.receive_untrusted())
            if not isinstance(request, DialRequest):
                raise RemoteProtocolError("AutoNAT: not a dial request")
            response = await self._respond(peer, request, messages)
            await messages.send(encode_v2(response))

    async def _respond(
        self, peer: PeerId, request: DialRequest, messages: MessageStream
    ) -> DialResponse:
        asker_ip = self._asker_ip(peer)
        if asker_ip is None:
            return self._refused(ResponseStatus.E_DIAL_REFUSED, E_TARGET)
        if not self._core.admit(peer, asker_ip, trio.current_time()):
            return self._refused(ResponseStatus.E_REQUEST_REJECTED, E_LIMIT)
        target = self._core.choose(request, asker_ip, trio.current_time())
        if target is None:
            return self._refused(ResponseStatus.E_DIAL_REFUSED, E_TARGET)
        if target.data_bytes:
            await _collect(messages, target)
        try:
            self._limiter.acquire_on_behalf_of_nowait(messages)
        except trio.WouldBlock:
            return self._refused(ResponseStatus.E_REQUEST_REJECTED, E_LIMIT)
        try:
            status = await self._dial(peer, target, request.nonce)
        finally:
            self._limiter.release_on_behalf_of(messages)
        return DialResponse(ResponseStatus.OK, target.index, status)

    def _refused(self, status: ResponseStatus, code: str) -> DialResponse:
        self._counters.add(REFUSALS, label=code)
        return DialResponse(status)

    async def _dial(self, peer: PeerId, target: Target, nonce: int) -> DialStatus:
        message = encode_dial_back(nonce)
        try:
            with trio.fail_after(self._config.dial_seconds):
                await self._dial_back.tell(
                    peer, target.ip, target.port, PROTOCOL_DIAL_BACK, delimited(message)
                )
        except (NoRoute, trio.TooSlowError):
            return DialStatus.E_DIAL_ERROR
        except Unavailable:
            return DialStatus.E_DIAL_BACK_ERROR
        return DialStatus.OK

    async def _serve_v1(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        """Answer one v1 request."""
        messages = MessageStream(stream, MAX_MESSAGE_BYTES)
        with trio.move_on_after(self._config.request_seconds):
            request = decode_dial_v1_untrusted(await messages.receive_untrusted())
            response = await self._respond_v1(peer, request)
            await messages.send(encode_response_v1(response))

    async def _respond_v1(self, peer: PeerId, request: DialV1) -> ResponseV1:
        asker_ip = self._asker_ip(peer)
        if asker_ip is None or not self._core.admit(
            peer, asker_ip, trio.current_time()
        ):
            self._counters.add(REFUSALS, label=E_LIMIT)
            return ResponseV1(StatusV1.E_DIAL_REFUSED, "too many, or not direct")
        targets = self._core.choose_v1(request, peer, asker_ip)
        if not targets:
            self._counters.add(REFUSALS, label=E_TARGET)
            return ResponseV1(StatusV1.E_DIAL_REFUSED, "no address of your own IP")
        for target in targets:
            try:
                self._limiter.acquire_on_behalf_of_nowait(request)
            except trio.WouldBlock:
                return ResponseV1(StatusV1.E_INTERNAL_ERROR, "busy")
            try:
                with trio.fail_after(self._config.dial_seconds):
                    await self._dial_back.reach(peer, target.ip, target.port)
            except (Unavailable, trio.TooSlowError):
                continue
            finally:
                self._limiter.release_on_behalf_of(request)
            return ResponseV1(StatusV1.OK, addr=request.addrs[target.index])
        return ResponseV1(StatusV1.E_DIAL_ERROR, "no address of yours answers")


async def _collect(messages: MessageStream, target: Target) -> None:
    """Make the asker pay for a dial to an address that is not its own."""
    ask = DialDataRequest(target.index, target.data_bytes)
    await messages.send(encode_v2(ask))
    missing = target.data_bytes
    while missing > 0:
        data = decode_v2_untrusted(await messages.receive_untrusted())
        if not isinstance(data, DialData) or data.size == 0:
            raise RemoteProtocolError("AutoNAT: no dial data")
        missing -= data.size
