"""Broadcast on py-libp2p's GossipSub.

GossipSub spreads a message over a mesh of a few neighbours per topic, each of which
forwards it once. What is set here and why: a heartbeat of 1 s (py-libp2p: 120 s), no
adaptive degrees and no address diversity (both misjudge a mesh on one machine),
protocol 1.1 (1.2 adds a control message per neighbour and message), signatures on
(without them anyone could use up another's message numbers and so silence it).
py-libp2p's limit of ten messages per second and link also hits what *we* publish and is
off; ours counts what a neighbour forwards.

Only admitted neighbours count: a message from anyone else is dropped before it is
looked at, and none of ours is sent to them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from fabric.core.errors import ResourceExhausted
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import DROPPED, PROTOCOL_ERRORS, REFUSALS
from fabric.net.config import GossipConfig
from fabric.net.libp2p_host import Libp2pHost
from fabric.net.protocols import GOSSIP_PROTOCOL, MAX_GOSSIP_BYTES
from fabric.net.tasks import collapse_group

log = logging.getLogger(__name__)

MESHSUB = TProtocol("/meshsub/1.1.0")
MAX_TOPICS = 64
"""Topics of one host; a peer may subscribe to as many."""
MAX_RPC_BYTES = 2 * MAX_GOSSIP_BYTES
"""Largest packet of a neighbour: one message with its envelope."""
BURST_SECONDS = 2.0
"""A neighbour's allowance may be saved up for this long."""

_Delivery = tuple[PeerId, bytes]


class Libp2pBroadcast:
    """See :class:`fabric.net.ports.Broadcast`. Made by :func:`open_broadcast`."""

    def __init__(
        self,
        host: Libp2pHost,
        config: GossipConfig,
        joins: trio.MemorySendChannel[str],
    ) -> None:
        self._host = host
        self._config = config
        self._joins = joins
        self._subscribers: dict[str, list[trio.MemorySendChannel[_Delivery]]] = {}
        self._allowance: dict[PeerId, tuple[float, float]] = {}
        self.router = _Router(self, config)
        self.pubsub = _Pubsub(self, host, self.router)

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send ``payload`` (at most 64 KiB) to the members of ``topic``, not to us."""
        if len(payload) > MAX_GOSSIP_BYTES:
            raise ValueError(f"payload of {len(payload)} B > {MAX_GOSSIP_BYTES} B")
        await self.pubsub.publish(topic, payload)
        # let the senders run: each has room for 32 messages and then drops
        await trio.lowlevel.checkpoint()

    def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[_Delivery]:
        """Return a bounded channel of (forwarder, payload); overflow is dropped.

        Raises:
            ResourceExhausted: more than ``MAX_TOPICS`` topics.
        """
        send, receive = trio.open_memory_channel[_Delivery](
            self._config.subscriber_messages
        )
        if topic not in self._subscribers:
            try:
                self._joins.send_nowait(topic)
            except trio.WouldBlock as exc:
                raise ResourceExhausted(f"more than {MAX_TOPICS} topics") from exc
        self._subscribers.setdefault(topic, []).append(send)
        return receive

    async def keep_streams(self) -> None:
        """Give every connected peer a gossip stream.

        py-libp2p opens one when a peer connects and gives up if the peer does not serve
        gossip *yet*; and it knows nothing of peers that connected before it ran. A peer
        is helped when two looks in a row miss it, so that the two never race.
        """
        missing = self._host.connected()
        while True:
            for peer in missing:
                if not await self.pubsub.ensure_peer_stream(ID.from_base58(peer)):
                    log.debug("gossip.no_stream peer=%s", short(peer))
            before = self._without_stream()
            await trio.sleep(self._config.repair_seconds)
            missing = before & self._without_stream()

    def _without_stream(self) -> frozenset[PeerId]:
        return self._host.connected() - {PeerId(str(p)) for p in self.pubsub.peers}

    # asked by the adapters below

    def admits(self, peer: PeerId) -> bool:
        """Return whether ``peer`` may forward gossip to us, and we to it."""
        return self._host.gate.allows(peer, GOSSIP_PROTOCOL).allowed

    def accepts(self, forwarder: PeerId) -> bool:
        """Return whether to look at a message of ``forwarder``; count a refusal."""
        counters = self._host.counters
        if not self.admits(forwarder):
            counters.add(REFUSALS, label="E_GOSSIP_NOT_ADMITTED")
            return False
        if not self._within_rate(forwarder, trio.current_time()):
            counters.add(DROPPED, label="gossip_rate")
            return False
        return True

    def _within_rate(self, forwarder: PeerId, now: float) -> bool:
        rate = self._config.max_messages_per_second
        saved, at = self._allowance.get(forwarder, (BURST_SECONDS * rate, now))
        saved = min(saved + (now - at) * rate, BURST_SECONDS * rate)
        if len(self._allowance) > 2 * len(self._host.connected()) + MAX_TOPICS:
            self._allowance.clear()  # peers long gone
        self._allowance[forwarder] = (max(saved - 1.0, 0.0), now)
        return saved >= 1.0

    def count_malformed(self) -> None:
        """Count a message that could not be parsed."""
        self._host.counters.add(PROTOCOL_ERRORS, label="gossip")

    def deliver(self, forwarder: PeerId, message: rpc_pb2.Message) -> None:
        """Hand a new, valid message to the subscribers of its topics."""
        for topic in message.topicIDs:
            channels = self._subscribers.get(topic, [])
            for channel in tuple(channels):
                try:
                    channel.send_nowait((forwarder, message.data))
                except trio.WouldBlock:
                    self._host.counters.add(DROPPED, label="gossip")
                except trio.BrokenResourceError:
                    channels.remove(channel)  # the subscriber closed its end

    def stop(self) -> None:
        """Close all subscriptions; messages under way find nobody."""
        subscribers, self._subscribers = self._subscribers, {}
        for channels in subscribers.values():
            for channel in channels:
                channel.close()


class _Pubsub(Pubsub):
    """Messages in and out of the router, with the Gate in front."""

    def __init__(
        self, broadcast: Libp2pBroadcast, host: Libp2pHost, router: GossipSub
    ) -> None:
        super().__init__(
            host.basic,
            router,
            strict_signing=True,
            max_subscriptions_per_rpc=MAX_TOPICS,
            max_subscriptions_per_peer=MAX_TOPICS,
            max_inbound_rpc_size=MAX_RPC_BYTES,
        )
        self._broadcast = broadcast
        self._own_id = host.basic.get_id()
        # by identity: the base class passes the message on, but not who sent it
        self._forwarder: dict[int, PeerId] = {}

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Take a message from a neighbour, or from ourselves."""
        if msg_forwarder == self._own_id:
            await super().push_msg(msg_forwarder, msg)
            return
        forwarder = PeerId(str(msg_forwarder))
        if len(msg.data) > MAX_GOSSIP_BYTES or not self._broadcast.accepts(forwarder):
            return
        self._forwarder[id(msg)] = forwarder
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception:
            # the library parses ids, keys and signatures of hostile bytes here, and
            # an error in this task of its would end gossip
            self._broadcast.count_malformed()
            log.debug("gossip.malformed from=%s", short(forwarder), exc_info=True)
        finally:
            del self._forwarder[id(msg)]

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """Deliver a message that is new and whose signature is good."""
        forwarder = self._forwarder.get(id(publish_message))
        if forwarder is not None:
            self._broadcast.deliver(forwarder, publish_message)


class _Router(GossipSub):
    """GossipSub that sends messages to admitted neighbours only."""

    def __init__(self, broadcast: Libp2pBroadcast, config: GossipConfig) -> None:
        super().__init__(
            protocols=[MESHSUB],
            degree=config.degree,
            degree_low=config.degree_low,
            degree_high=config.degree_high,
            heartbeat_interval=config.heartbeat_seconds,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
        )
        self._broadcast = broadcast

    def send_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC, priority: bool = False) -> None:
        """Queue ``rpc`` for a neighbour, without messages if it is not admitted."""
        if rpc.publish and not self._broadcast.admits(PeerId(str(peer_id))):
            return
        super().send_rpc(peer_id, rpc, priority)


@asynccontextmanager
async def open_broadcast(
    host: Libp2pHost, config: GossipConfig | None = None
) -> AsyncIterator[Libp2pBroadcast]:
    """Run gossip on ``host`` until the block is left."""
    # as many as there may be topics: a join waits for one heartbeat at most
    joins, joining = trio.open_memory_channel[str](MAX_TOPICS)
    broadcast = Libp2pBroadcast(host, config or GossipConfig(), joins)
    pubsub = broadcast.pubsub
    with collapse_group():
        async with (
            background_trio_service(pubsub),
            background_trio_service(broadcast.router),
            trio.open_nursery() as nursery,
        ):
            await pubsub.wait_until_ready()
            nursery.start_soon(_join_topics, pubsub, joining)
            nursery.start_soon(broadcast.keep_streams)
            try:
                yield broadcast
            finally:
                broadcast.stop()
                nursery.cancel_scope.cancel()


async def _join_topics(pubsub: Pubsub, topics: trio.MemoryReceiveChannel[str]) -> None:
    async for topic in topics:
        await pubsub.subscribe(topic)
