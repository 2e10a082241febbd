"""The boundary of inbound streams: the one place that runs handlers.

It asks the Gate *before* a protocol is agreed on, so a refused peer learns of it when
it opens the stream, and it keeps a handler's error from ending the host.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost

from fabric.core.errors import FabricError
from fabric.core.ids import PeerId, public_key_of, short
from fabric.core.telemetry import BUGS, PROTOCOL_ERRORS, REFUSALS, Counters
from fabric.net.libp2p_guard import BoundedCommunicator
from fabric.net.libp2p_stream import reset
from fabric.net.ports import Gate

log = logging.getLogger(__name__)

OWN_PREFIX = "/fabric/"
"""The Gate is asked about these, whoever serves them (Kademlia does by itself)."""
MAX_PROPOSALS = 8
"""Protocols a peer may propose on one stream before it is reset."""

_RawHandler = Callable[[INetStream], Awaitable[None]]


class InboundStreams:
    """Serves the streams that peers open.

    Args:
        basic: Holds the handlers by protocol.
        gate: Who may open what.
        counters: Where refusals and errors are counted.
        seconds: A peer must have proposed a protocol we serve within this.
    """

    def __init__(
        self, basic: BasicHost, gate: Gate, counters: Counters, seconds: float
    ) -> None:
        self._basic = basic
        self._gate = gate
        self._counters = counters
        self._seconds = seconds
        # those with handlers of ours; py-libp2p's own (identify, ping) are open to all
        self._gated: set[str] = set()

    def gate(self, protocol: str) -> None:
        """Ask the Gate before ``protocol`` is agreed on."""
        self._gated.add(protocol)

    async def serve(self, stream: INetStream) -> None:
        """Agree on a protocol and run its handler; no error leaves."""
        peer = PeerId(str(stream.muxed_conn.peer_id))
        try:
            with trio.fail_after(self._seconds):
                handler = await self._negotiate(peer, stream)
            if handler is not None:
                await handler(stream)
                stream.muxed_stream.finish_now()
                return
        except (
            BaseLibp2pError,
            UnicodeDecodeError,
            DecodeError,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            trio.TooSlowError,
        ) as exc:
            log.debug("stream.broke peer=%s error=%r", short(peer), exc)
        except FabricError as exc:
            self._counters.add(PROTOCOL_ERRORS, label=exc.code)
            log.debug("stream.failed peer=%s code=%s", short(peer), exc.code)
        except Exception:
            # the one boundary of handlers: a bug of ours must not end the host
            self._counters.add(BUGS)
            log.exception("stream.bug peer=%s", short(peer))
        reset(stream)

    async def _negotiate(self, peer: PeerId, stream: INetStream) -> _RawHandler | None:
        """Return the handler of the first protocol we serve to ``peer``, or None."""
        public_key_of(peer)
        mux = self._basic.get_mux()
        channel = BoundedCommunicator(stream)
        await mux.handshake(channel)
        for _ in range(MAX_PROPOSALS):
            name = await channel.read()
            handler: _RawHandler | None = mux.handlers.get(TProtocol(name))
            if handler is None:
                await channel.write("na")
                continue
            if not self._admits(peer, name):
                return None
            await channel.write(name)
            stream.set_protocol(TProtocol(name))
            return handler
        return None

    def _admits(self, peer: PeerId, protocol: str) -> bool:
        if protocol not in self._gated and not protocol.startswith(OWN_PREFIX):
            return True
        decision = self._gate.allows(peer, protocol)
        if not decision.allowed:
            self._counters.add(REFUSALS, label=decision.code or "E_REFUSED")
        return decision.allowed
