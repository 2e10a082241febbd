"""A network of hosts in one process, in virtual time, with faults on demand.

Implements the production interfaces (Host, Broadcast, ContentRouting), so that tests
and simulations run the real services on it under trio's ``autojump_clock``. The world
is edited from outside: :meth:`MemoryNetwork.partition`, :meth:`~MemoryNetwork.heal`,
:meth:`~MemoryNetwork.kill`.

Links have latency and bandwidth; streams never lose bytes (TCP would repeat them),
gossip does.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Self

import msgspec
import trio

from fabric.core.errors import (
    ConfigError,
    FabricError,
    IntegrityError,
    NoRoute,
    RemoteRefused,
    Unavailable,
)
from fabric.core.ids import PeerId, short
from fabric.core.signing import Signer
from fabric.core.telemetry import BUGS, DROPPED, PROTOCOL_ERRORS, REFUSALS, Counters
from fabric.net.host import (
    PeerConnected,
    PeerDisconnected,
    PeerEvent,
    StreamHandler,
    TakeSocket,
)
from fabric.net.memory_gossip import MemoryBroadcast, MemoryRouting, Message, Node
from fabric.net.memory_stream import Link, MemoryStream, stream_pair
from fabric.net.ports import Gate
from fabric.net.tasks import collapse_group

log = logging.getLogger(__name__)

EVENT_ROOM = 256
"""As in the libp2p host: events a slow listener may lag behind."""


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """What every link of the network is like.

    Attributes:
        latency_seconds: One way.
        bytes_per_second: Of one stream, each way; 0 = unlimited.
        loss: Fraction of gossip deliveries that vanish, in [0, 1].
    """

    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    loss: float = 0.0


class MemoryNetwork:
    """The world the hosts live in. Use it as a context manager.

    Args:
        seed: Decides which gossip messages are lost.
        conditions: What the links are like.
    """

    def __init__(self, seed: int, conditions: Conditions | None = None) -> None:
        self.conditions = conditions or Conditions()
        self.rng = random.Random(seed)
        self.nursery: trio.Nursery | None = None
        self._hosts: dict[PeerId, MemoryHost] = {}
        self._group: dict[PeerId, int] = {}
        self.message_numbers = itertools.count()

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Self]:
        """Run the handlers and deliveries of all hosts until the block is left."""
        with collapse_group():
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                try:
                    yield self
                finally:
                    nursery.cancel_scope.cancel()
                    for peer in tuple(self._hosts):
                        self.kill(peer)

    def host(
        self, signer: Signer, gate: Gate, counters: Counters | None = None
    ) -> MemoryHost:
        """Return a running host with the identity of ``signer``.

        Raises:
            ConfigError: that identity runs already.
        """
        if signer.peer_id in self._hosts:
            raise ConfigError(f"{signer.peer_id} runs already", code="E_PORT_IN_USE")
        host = MemoryHost(self, signer.peer_id, gate, counters or Counters())
        self._hosts[signer.peer_id] = host
        return host

    def partition(self, groups: Iterable[Iterable[PeerId]]) -> None:
        """Let peers reach only their own group; peers in no group form one more.

        Connections across the cut break.
        """
        self._group = {p: i for i, group in enumerate(groups) for p in group}
        for host in self._hosts.values():
            for peer in host.connected():
                if not self.reaches(host.peer_id, peer):
                    host.drop(peer, "the network is partitioned")

    def heal(self) -> None:
        """Let every peer reach every other again; nobody reconnects by itself."""
        self._group = {}

    def kill(self, peer: PeerId) -> None:
        """Let ``peer`` vanish: its connections break, its address stays silent."""
        host = self._hosts.pop(peer, None)
        if host is not None:
            for other in host.connected():
                host.drop(other, "the peer was killed")
            host.stop()

    def find(self, peer: PeerId) -> MemoryHost | None:
        """Return the running host of ``peer``, or None."""
        return self._hosts.get(peer)

    def peers(self) -> tuple[PeerId, ...]:
        """Return the running peers."""
        return tuple(self._hosts)

    def reaches(self, one: PeerId, other: PeerId) -> bool:
        """Return whether packets pass between two peers."""
        return self._group.get(one) == self._group.get(other)

    def link(self) -> Link:
        """Return the delay line of one direction of a new stream."""
        return Link(self.conditions.latency_seconds, self.conditions.bytes_per_second)


class MemoryHost:
    """See :class:`fabric.net.host.Host`. Made by :meth:`MemoryNetwork.host`.

    Attributes:
        gate: Who may open what.
        counters: Where refusals and errors are counted.
    """

    def __init__(
        self, network: MemoryNetwork, peer_id: PeerId, gate: Gate, counters: Counters
    ) -> None:
        self.gate = gate
        self.counters = counters
        self._network = network
        self._peer_id = peer_id
        self._handlers: dict[str, StreamHandler] = {}
        self._bindings: dict[PeerId, bytes] = {}
        self._streams: dict[PeerId, set[MemoryStream]] = {}
        self._listeners: list[trio.MemorySendChannel[PeerEvent]] = []
        self.broadcast = MemoryBroadcast(self, network.message_numbers)
        self.routing = MemoryRouting(self)

    @property
    def peer_id(self) -> PeerId:
        """This host's identity."""
        return self._peer_id

    def addrs(self) -> tuple[str, ...]:
        """Return the one address of this host."""
        return (f"/memory/{self._peer_id}/p2p/{self._peer_id}",)

    def connected(self) -> frozenset[PeerId]:
        """Return the peers with a live connection."""
        return frozenset(self._bindings)

    def share_listener(self, take: TakeSocket) -> None:
        """Do nothing: there is no listener to share."""

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """Return a new bounded channel of connection events (overflow is dropped)."""
        send, receive = trio.open_memory_channel[PeerEvent](EVENT_ROOM)
        self._listeners.append(send)
        return receive

    async def connect(self, peer: PeerId, addrs: Sequence[str]) -> None:
        """Have a live connection with ``peer``; see :class:`fabric.net.host.Host`."""
        if peer in self._bindings:
            return
        await trio.sleep(3 * self._network.conditions.latency_seconds)
        impostors, errors = [], []
        for addr in addrs:
            owner = PeerId(addr.removeprefix("/memory/").partition("/")[0])
            other = self._network.find(owner)
            if other is None or not self._network.reaches(self._peer_id, owner):
                errors.append(f"{addr}: nobody answers")
            elif owner != peer:
                impostors.append(addr)
            else:
                if peer not in self._bindings:
                    self._join(other)
                return
        if impostors:
            raise IntegrityError(
                f"{', '.join(impostors)} answered, but not as {peer}",
                code="E_WRONG_PEER",
            )
        raise NoRoute(
            f"no address of {short(peer)} answers: " + "; ".join(errors),
            next_step="check that the peer runs and that its address is current",
        )

    def _join(self, other: MemoryHost) -> None:
        binding = self._network.rng.randbytes(32)
        for near, far in ((self, other), (other, self)):
            near._bindings[far.peer_id] = binding
            near._streams[far.peer_id] = set()
            near._publish(PeerConnected(far.peer_id))

    async def open_stream(self, peer: PeerId, protocol: str) -> MemoryStream:
        """Open a stream; see :class:`fabric.net.host.Host`."""
        await trio.sleep(2 * self._network.conditions.latency_seconds)
        other = self._network.find(peer)
        if peer not in self._bindings or other is None:
            raise Unavailable(
                f"not connected with {short(peer)}", code="E_NOT_CONNECTED"
            )
        if not other.admits(self._peer_id, protocol):
            raise RemoteRefused(
                f"{short(peer)} does not serve {protocol} to us",
                code="E_PROTOCOL_REFUSED",
                next_step=f"check that {short(peer)} has admitted this peer",
            )
        ours, theirs = stream_pair(self._network.link(), self._network.link())
        self._streams[peer].add(ours)
        other._streams[self._peer_id].add(theirs)
        assert self._network.nursery is not None
        self._network.nursery.start_soon(other.serve, self._peer_id, protocol, theirs)
        return ours

    def admits(self, peer: PeerId, protocol: str) -> bool:
        """Return whether ``peer`` may open ``protocol``, and that we serve it."""
        if protocol not in self._handlers:
            return False
        decision = self.gate.allows(peer, protocol)
        if not decision.allowed:
            self.counters.add(REFUSALS, label=decision.code or "E_REFUSED")
        return decision.allowed

    async def serve(self, peer: PeerId, protocol: str, stream: MemoryStream) -> None:
        """Run the handler of one inbound stream; no error leaves."""
        try:
            await self._handlers[protocol](peer, stream)
            await stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            log.debug("stream.broke peer=%s error=%r", short(peer), exc)
        except FabricError as exc:
            self.counters.add(PROTOCOL_ERRORS, label=exc.code)
        except Exception:
            self.counters.add(BUGS)
            log.exception("stream.bug peer=%s", short(peer))
        finally:
            stream.abort()
            self._streams.get(peer, set()).discard(stream)

    def set_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of ``protocol``, which starts with a slash."""
        if not protocol.startswith("/"):
            raise ValueError(f"{protocol!r} does not start with '/'")
        self._handlers[protocol] = handler

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection with ``peer``."""
        self.drop(peer, "we closed the connection")
        await trio.lowlevel.checkpoint()

    def drop(self, peer: PeerId, reason: str) -> None:
        """Break the connection with ``peer`` on both sides."""
        other = self._network.find(peer)
        self._leave(peer, reason)
        if other is not None:
            other._leave(self._peer_id, reason)

    def _leave(self, peer: PeerId, reason: str) -> None:
        if self._bindings.pop(peer, None) is None:
            return
        for stream in self._streams.pop(peer):
            stream.cut()
        self._publish(PeerDisconnected(peer, reason))

    def channel_binding(self, peer: PeerId, stream: trio.abc.Stream) -> bytes:
        """Return 32 bytes that only the two ends of the connection share."""
        if peer not in self._bindings:
            raise Unavailable(
                f"not connected with {short(peer)}", code="E_NOT_CONNECTED"
            )
        return self._bindings[peer]

    def stop(self) -> None:
        """Close the channels of this host."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()
        self.broadcast.stop()

    # for gossip and routing

    def find(self, peer: PeerId) -> Node | None:
        """Return another running host, or None."""
        return self._network.find(peer)

    def latency(self) -> float:
        """Return the seconds one way."""
        return self._network.conditions.latency_seconds

    def lost(self) -> bool:
        """Draw whether one gossip delivery is lost."""
        return self._network.rng.random() < self._network.conditions.loss

    def spawn_delivery(self, node: Node, forwarder: PeerId, message: Message) -> None:
        """Deliver ``message`` to ``node`` after the latency."""
        assert self._network.nursery is not None
        self._network.nursery.start_soon(self._deliver, node, forwarder, message)

    async def _deliver(self, node: Node, forwarder: PeerId, message: Message) -> None:
        await trio.sleep(self.latency())
        node.broadcast.receive(forwarder, message)

    def _publish(self, event: PeerEvent) -> None:
        for listener in tuple(self._listeners):
            try:
                listener.send_nowait(event)
            except trio.WouldBlock:
                self.counters.add(DROPPED, label="peer_events")
            except trio.BrokenResourceError:
                self._listeners.remove(listener)
