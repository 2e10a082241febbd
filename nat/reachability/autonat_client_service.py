"""Ask other peers to dial us: AutoNAT v2 with a nonce, else v1."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import trio

from fabric.core.errors import RemoteProtocolError, RemoteRefused, ResourceExhausted
from fabric.core.ids import PeerId
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.delimited import MessageStream
from fabric.net.traversal_api import TraversalHost
from nat.reachability.autonat import AddressVerdict, AutonatClient, judge_v1
from nat.reachability.autonat_messages import (
    DATA_CHUNK_BYTES,
    DIAL_BACK_OK,
    MAX_MESSAGE_BYTES,
    PROTOCOL_DIAL_BACK,
    PROTOCOL_DIAL_REQUEST,
    PROTOCOL_V1,
    DialData,
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialV1,
    decode_dial_back_untrusted,
    decode_response_v1_untrusted,
    decode_v2_untrusted,
    encode_dial_v1,
    encode_v2,
)
from nat.reachability.config import AutonatConfig

E_NONCE = "E_AUTONAT_NONCE"
"""Label of dial-backs that nobody asked for."""


class AutonatAsker:
    """Asks; receives dial-backs on ``host`` from its making on.

    Args:
        host: Whose addresses are in question.
        config: Time limits.
        counters: Where unasked dial-backs are counted.
    """

    def __init__(
        self, host: TraversalHost, config: AutonatConfig, counters: Counters
    ) -> None:
        self._host = host
        self._config = config
        self._counters = counters
        self._core = AutonatClient(secrets.randbits)
        host.set_handler(PROTOCOL_DIAL_BACK, self._on_dial_back)

    async def ask(
        self, server: PeerId, addresses: Sequence[str], own_ip: str = ""
    ) -> tuple[AddressVerdict, ...]:
        """Return what ``server`` finds about each of ``addresses`` (multiaddrs).

        Bound it with ``trio.fail_after`` at the call site; a server takes at most
        ``request_seconds`` per address.

        Args:
            server: A connected peer.
            addresses: In question.
            own_ip: Where it sees us; what a v1 server's failure is about.

        Raises:
            RemoteRefused: it serves neither version.
            Unavailable: the connection broke.
            RemoteProtocolError: it broke the protocol.
        """
        verdicts = []
        try:
            for address in addresses:
                verdicts.append(await self._ask_v2(server, address))
        except RemoteRefused:
            return await self._ask_v1(server, addresses, own_ip)
        return tuple(verdicts)

    async def _ask_v2(self, server: PeerId, address: str) -> AddressVerdict:
        request = self._core.request([address], trio.current_time())
        if request is None:
            raise ResourceExhausted("too many AutoNAT requests under way")
        try:
            stream = await self._host.open_stream(server, PROTOCOL_DIAL_REQUEST)
            async with stream:
                messages = MessageStream(stream, MAX_MESSAGE_BYTES)
                await messages.send(encode_v2(request))
                response = await self._answer(messages, request)
                return self._core.judge(request, response)
        finally:
            self._core.finish(request.nonce)

    async def _answer(
        self, messages: MessageStream, request: DialRequest
    ) -> DialResponse:
        """Return the response; pay with dial data once, if the server wants some."""
        answer = decode_v2_untrusted(await messages.receive_untrusted())
        if isinstance(answer, DialDataRequest):
            missing = self._core.data_bytes(request, answer)
            while missing > 0:
                size = min(missing, DATA_CHUNK_BYTES)
                await messages.send(encode_v2(DialData(size)))
                missing -= size
            answer = decode_v2_untrusted(await messages.receive_untrusted())
        if not isinstance(answer, DialResponse):
            raise RemoteProtocolError("AutoNAT: not a dial response")
        return answer

    async def _ask_v1(
        self, server: PeerId, addresses: Sequence[str], own_ip: str
    ) -> tuple[AddressVerdict, ...]:
        stream = await self._host.open_stream(server, PROTOCOL_V1)
        async with stream:
            messages = MessageStream(stream, MAX_MESSAGE_BYTES)
            request = DialV1(self._host.peer_id, tuple(addresses))
            await messages.send(encode_dial_v1(request))
            data = await messages.receive_untrusted()
        return judge_v1(addresses, decode_response_v1_untrusted(data), own_ip)

    async def _on_dial_back(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        """Take the nonce of a dial-back."""
        messages = MessageStream(stream, MAX_MESSAGE_BYTES)
        with trio.move_on_after(self._config.dial_seconds):
            nonce = decode_dial_back_untrusted(await messages.receive_untrusted())
            # which of its connections carries the stream is not known; one that it
            # dialled shows that it could, wherever it says the nonce
            dialled_in = any(
                info.kind == "direct" and not info.outbound
                for info in self._host.connections(peer)
            )
            if self._core.on_dial_back(nonce, dialled_in=dialled_in):
                await messages.send(DIAL_BACK_OK)
            else:
                self._counters.add(REFUSALS, label=E_NONCE)
