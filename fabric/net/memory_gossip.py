"""Gossip and content routing between the hosts of a :class:`MemoryNetwork`.

Both follow the connections between hosts and ask the same gates as the real ones.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

import trio

from fabric.core.ids import PeerId
from fabric.core.telemetry import DROPPED, REFUSALS, Counters
from fabric.net.ports import Gate
from fabric.net.protocols import GOSSIP_PROTOCOL, KAD_PROTOCOL, MAX_GOSSIP_BYTES

SUBSCRIBER_ROOM = 256
"""Messages a slow subscriber may lag behind, as in the libp2p adapter."""
SEEN_ROOM = 4096
"""Message ids remembered against duplicates."""
REPLICAS = 20
"""Peers that store a provider record (Kademlia's k)."""


class Node(Protocol):
    """What gossip and routing need to know of their host."""

    gate: Gate
    counters: Counters
    broadcast: MemoryBroadcast
    routing: MemoryRouting

    @property
    def peer_id(self) -> PeerId:
        """Its identity."""
        ...

    def connected(self) -> frozenset[PeerId]:
        """The peers it is connected with."""
        ...

    def find(self, peer: PeerId) -> Node | None:
        """Another running host."""
        ...

    def latency(self) -> float:
        """Seconds one way."""
        ...

    def lost(self) -> bool:
        """Draw whether one gossip delivery is lost."""
        ...

    def spawn_delivery(self, node: Node, forwarder: PeerId, message: Message) -> None:
        """Deliver ``message`` to ``node`` after the latency."""
        ...


Message = tuple[int, str, bytes]
"""(number unique in the network, topic, payload)."""


class MemoryBroadcast:
    """See :class:`fabric.net.ports.Broadcast`: floods along connections."""

    def __init__(self, node: Node, numbers: Iterable[int]) -> None:
        self._node = node
        self._numbers = iter(numbers)
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._subscribers: dict[
            str, list[trio.MemorySendChannel[tuple[PeerId, bytes]]]
        ] = {}

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send ``payload`` to the members of ``topic``, not to ourselves."""
        if len(payload) > MAX_GOSSIP_BYTES:
            raise ValueError(f"payload of {len(payload)} B > {MAX_GOSSIP_BYTES} B")
        message = (next(self._numbers), topic, payload)
        self._remember(message[0])
        self._forward(message, self._node.peer_id)
        await trio.lowlevel.checkpoint()

    def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[PeerId, bytes]]:
        """Return a bounded channel of (forwarder, payload); overflow is dropped."""
        send, receive = trio.open_memory_channel[tuple[PeerId, bytes]](SUBSCRIBER_ROOM)
        self._subscribers.setdefault(topic, []).append(send)
        return receive

    def receive(self, forwarder: PeerId, message: Message) -> None:
        """Take a message from a neighbour; hand it on the first time."""
        number, topic, payload = message
        if number in self._seen or topic not in self._subscribers:
            return
        if forwarder not in self._node.connected():
            return  # the connection broke while the message was under way
        decision = self._node.gate.allows(forwarder, GOSSIP_PROTOCOL)
        if not decision.allowed:
            self._node.counters.add(REFUSALS, label=decision.code or "E_REFUSED")
            return
        self._remember(number)
        for channel in self._subscribers[topic]:
            try:
                channel.send_nowait((forwarder, payload))
            except trio.WouldBlock:
                self._node.counters.add(DROPPED, label="gossip")
            except trio.BrokenResourceError:
                continue
        self._forward(message, forwarder)

    def _forward(self, message: Message, source: PeerId) -> None:
        for peer in sorted(self._node.connected() - {source}):
            other = self._node.find(peer)
            if other is not None and not self._node.lost():
                self._node.spawn_delivery(other, self._node.peer_id, message)

    def _remember(self, number: int) -> None:
        self._seen[number] = None
        while len(self._seen) > SEEN_ROOM:
            self._seen.popitem(last=False)

    def stop(self) -> None:
        """Close all subscriptions."""
        subscribers, self._subscribers = self._subscribers, {}
        for channels in subscribers.values():
            for channel in channels:
                channel.close()


class MemoryRouting:
    """See :class:`fabric.net.routing_api.ContentRouting`: XOR-closest peers store."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._records: dict[bytes, dict[PeerId, None]] = {}

    async def provide(self, key: bytes) -> int:
        """Announce that we hold ``key``; return how many peers stored it."""
        await trio.sleep(2 * self._node.latency())
        others = sorted(self._reachable(), key=lambda node: _distance(node, key))
        return sum(
            other.routing.store(self._node.peer_id, key) for other in others[:REPLICAS]
        )

    async def find_providers(self, key: bytes, limit: int) -> tuple[PeerId, ...]:
        """Return up to ``limit`` distinct peers said to hold ``key``."""
        await trio.sleep(2 * self._node.latency())
        found = dict(self._records.get(key, {}))
        for other in self._reachable():
            found |= other.routing.lookup(self._node.peer_id, key)
        found.pop(self._node.peer_id, None)
        return tuple(found)[:limit]

    def store(self, provider: PeerId, key: bytes) -> bool:
        """Keep a record if the gate admits ``provider``."""
        if not self._node.gate.allows(provider, KAD_PROTOCOL).allowed:
            return False
        self._records.setdefault(key, {})[provider] = None
        return True

    def lookup(self, asker: PeerId, key: bytes) -> dict[PeerId, None]:
        """Return the records of ``key`` if the gate admits ``asker``."""
        if not self._node.gate.allows(asker, KAD_PROTOCOL).allowed:
            return {}
        return dict(self._records.get(key, {}))

    def _reachable(self) -> list[Node]:
        """Return the hosts that a walk along connections finds, without ourselves."""
        found: dict[PeerId, Node] = {self._node.peer_id: self._node}
        frontier = [self._node]
        while frontier:
            for peer in sorted(frontier.pop().connected()):
                node = self._node.find(peer)
                if peer not in found and node is not None:
                    found[peer] = node
                    frontier.append(node)
        del found[self._node.peer_id]
        return list(found.values())


def _distance(node: Node, key: bytes) -> bytes:
    name = hashlib.sha256(node.peer_id.encode()).digest()
    target = hashlib.sha256(key).digest()
    return bytes(a ^ b for a, b in zip(name, target, strict=True))
