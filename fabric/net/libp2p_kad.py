"""Content routing on py-libp2p's Kademlia.

py-libp2p's :class:`KadDHT` *serves* here: it answers requests and keeps the routing
table and the records others gave us. The *asking* is ours, because its own answers from
a local cache for 48 hours, returns one provider many times, and reports a record as
stored without looking. :meth:`Libp2pRouting.provide` counts a peer only after that peer
named us as a provider.

The protocol is our own, ``/fabric/kad/1.0.0``, so that the Gate is asked and that we
never mix with the public DHT: KadDHT is given a view of the host that renames it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import INetStream
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht.common import PROTOCOL_ID as STOCK_PROTOCOL
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from fabric.core.errors import FabricError, RemoteProtocolError
from fabric.core.ids import PeerId, public_key_of, short
from fabric.net.config import RoutingConfig
from fabric.net.host import PeerConnected, PeerEvent
from fabric.net.libp2p_host import Libp2pHost
from fabric.net.libp2p_stream import forget
from fabric.net.lookup import MAX_PEER_ADDRS, Walk
from fabric.net.protocols import KAD_PROTOCOL
from fabric.net.tasks import collapse_group

log = logging.getLogger(__name__)

KEY_BYTES = 32
"""Length of a content key."""
MAX_ANSWER_BYTES = 256 * 1024
"""Largest answer: 20 peers and 20 providers with their addresses."""
MAX_PACED_PEERS = 4096
"""Peers whose pacing is remembered."""


class Libp2pRouting:
    """A :class:`fabric.net.routing_api.ContentRouting`; see :func:`open_routing`.

    Attributes:
        meet: Awaited when a peer was dialled: brings it to serve us.
    """

    def __init__(self, host: Libp2pHost, dht: KadDHT, config: RoutingConfig) -> None:
        self.meet: Callable[[PeerId], Awaitable[None]] = _as_met
        self._host = host
        self._dht = dht
        self._config = config
        self._next_store: dict[PeerId, float] = {}

    async def provide(self, key: bytes) -> int:
        """Announce that we hold ``key`` (32 bytes); return how many peers stored it.

        Takes at least a second per call before it, because peers refuse faster.
        """
        walk = await self._walk(key, enough=None)
        stored: list[PeerId] = []
        limiter = trio.CapacityLimiter(self._config.parallel)

        async def store(peer: PeerId) -> None:
            async with limiter:
                await self._wait_for_turn(peer)
                providers = await self._ask(walk, peer, announce=True)
            if self._host.peer_id in providers:
                stored.append(peer)

        async with trio.open_nursery() as nursery:
            for peer in walk.nearest(walk.answered, self._config.replicas):
                nursery.start_soon(store, peer)
        return len(stored)

    async def find_providers(self, key: bytes, limit: int) -> tuple[PeerId, ...]:
        """Return up to ``limit`` distinct peers said to hold ``key``, asked afresh."""
        walk = await self._walk(key, enough=limit)
        walk.providers.pop(self._host.peer_id, None)
        return tuple(walk.providers)[:limit]

    async def _walk(self, key: bytes, enough: int | None) -> Walk:
        """Ask nearer and nearer peers until none is nearer, or ``enough`` is found."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"key of {len(key)} B, not {KEY_BYTES}")
        walk = self._new_walk(key, enough)
        bell, answers = trio.open_memory_channel[None](1)  # one ring says all
        with trio.move_on_after(self._config.search_seconds):
            async with trio.open_nursery() as nursery:
                while not walk.is_over(now := trio.current_time()):
                    for peer in walk.take(now):
                        nursery.start_soon(self._visit, walk, peer, bell)
                    with trio.move_on_at(walk.next_timeout(now)):
                        await answers.receive()
                nursery.cancel_scope.cancel()  # whoever was passed over
        return walk

    def _new_walk(self, key: bytes, enough: int | None) -> Walk:
        config = self._config
        walk = Walk(
            key,
            self._host.peer_id,
            replicas=config.replicas,
            parallel=config.parallel,
            enough=enough,
        )
        for peer in self._host.connected():
            walk.learn(peer, ())
        for known in self._dht.routing_table.find_local_closest_peers(
            key, config.replicas
        ):
            walk.learn(PeerId(str(known)), self._stored_addrs(known))
        for info in self._dht.provider_store.get_providers(key):
            walk.providers[PeerId(str(info.peer_id))] = None  # others gave us these
        return walk

    async def _visit(
        self, walk: Walk, peer: PeerId, bell: trio.MemorySendChannel[None]
    ) -> None:
        await self._ask(walk, peer, announce=False)
        with suppress(trio.WouldBlock):
            bell.send_nowait(None)

    async def _ask(
        self, walk: Walk, peer: PeerId, *, announce: bool
    ) -> tuple[PeerId, ...]:
        """Return the providers that ``peer`` names; none if it does not answer."""
        try:
            with trio.fail_after(self._config.query_seconds):
                if peer not in self._host.connected():
                    await self._host.connect(peer, walk.known[peer])
                    await self.meet(peer)
                answer = await self._exchange(walk.key, peer, announce=announce)
            providers = [_peer_of(record) for record in answer.providerPeers]
            for record in answer.closerPeers:
                walk.learn(_peer_of(record), _addrs_of(record))
        except (FabricError, BaseLibp2pError, trio.TooSlowError) as exc:
            log.debug("kad.no_answer peer=%s error=%r", short(peer), exc)
            self._dht.routing_table.remove_peer(ID.from_base58(peer))
            walk.miss(peer)
            return ()
        walk.hear(peer, () if announce else providers)
        return tuple(providers)

    async def _exchange(self, key: bytes, peer: PeerId, *, announce: bool) -> Message:
        """Ask ``peer`` for providers of ``key``, after announcing ourselves if told."""
        stream = await self._host.open_raw(peer, KAD_PROTOCOL)
        try:
            if announce:
                # one stream is served in order: the answer below shows the store
                await _send(stream, self._announcement(key))
            await _send(
                stream, Message(type=Message.MessageType.GET_PROVIDERS, key=key)
            )
            while True:
                answer = await _receive_untrusted(stream)
                if answer.type == Message.MessageType.GET_PROVIDERS:
                    return answer
        finally:
            stream.muxed_stream.discard_now()
            forget(stream)

    def _announcement(self, key: bytes) -> Message:
        message = Message(type=Message.MessageType.ADD_PROVIDER, key=key)
        record = message.providerPeers.add()
        record.id = ID.from_base58(self._host.peer_id).to_bytes()
        record.addrs.extend(Multiaddr(addr).to_bytes() for addr in self._host.addrs())
        return message

    def _stored_addrs(self, peer: ID) -> list[str]:
        info = self._dht.routing_table.get_peer_info(peer)
        return [str(addr) for addr in info.addrs] if info is not None else []

    async def _wait_for_turn(self, peer: PeerId) -> None:
        now = trio.current_time()
        turn = max(now, self._next_store.get(peer, now))
        if len(self._next_store) >= MAX_PACED_PEERS:
            self._next_store = {p: t for p, t in self._next_store.items() if t > now}
        self._next_store[peer] = turn + self._config.store_interval_seconds
        await trio.sleep_until(turn)

    async def watch(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        """Keep connected peers in the routing table, so that others learn of them."""
        for peer in self._host.connected():
            await self._note(peer)
        async for event in events:
            if isinstance(event, PeerConnected):
                await self._note(event.peer)

    async def _note(self, peer: PeerId) -> None:
        # without addresses: answers take those that identify found by then
        await self._dht.routing_table.add_peer(
            PeerInfo(ID.from_base58(peer), []), skip_server_mode_check=True
        )


async def _as_met(peer: PeerId) -> None:
    """Do nothing: for a host whose peers serve whoever is connected."""
    await trio.lowlevel.checkpoint()


class _KadView:
    """The host as KadDHT sees it: its protocol is ours, its dials are our dialer's."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # a view of the host
        return getattr(self._host.basic, name)

    def set_stream_handler(
        self, protocol_id: TProtocol, stream_handler: StreamHandlerFn
    ) -> None:
        """Serve under our protocol."""
        self._host.basic.set_stream_handler(TProtocol(KAD_PROTOCOL), stream_handler)

    async def new_stream(
        self, peer_id: ID, protocol_ids: Sequence[TProtocol]
    ) -> INetStream:
        """Open a stream to a connected peer under our protocol."""
        if list(protocol_ids) != [STOCK_PROTOCOL]:
            raise RemoteProtocolError(f"not for Kademlia: {list(protocol_ids)}")
        return await self._host.open_raw(PeerId(str(peer_id)), KAD_PROTOCOL)


def _peer_of(record: Message.Peer) -> PeerId:
    """Return the PeerId in ``record``.

    Raises:
        RemoteProtocolError: not the id of an Ed25519 key.
    """
    peer = PeerId(ID(record.id).to_base58())
    public_key_of(peer)
    return peer


def _addrs_of(record: Message.Peer) -> list[str]:
    addrs = []
    for raw in record.addrs[:MAX_PEER_ADDRS]:
        try:
            addrs.append(str(Multiaddr(raw)))
        except (MultiaddrError, ValueError):
            continue
    return addrs


async def _send(stream: INetStream, message: Message) -> None:
    data = message.SerializeToString()
    await stream.write(encode_varint_prefixed(data))


async def _receive_untrusted(stream: INetStream) -> Message:
    data = await read_varint_prefixed_bytes_limited(stream, MAX_ANSWER_BYTES)
    message = Message()
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise RemoteProtocolError(f"not a Kademlia message: {exc}") from exc
    return message


@asynccontextmanager
async def open_routing(
    host: Libp2pHost, config: RoutingConfig | None = None
) -> AsyncIterator[Libp2pRouting]:
    """Serve and use Kademlia on ``host`` until the block is left."""
    dht = KadDHT(_KadView(host), DHTMode.SERVER, enable_values=False)
    routing = Libp2pRouting(host, dht, config or RoutingConfig())
    with collapse_group():
        async with background_trio_service(dht):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(routing.watch, host.events())
                try:
                    yield routing
                finally:
                    nursery.cancel_scope.cancel()
