"""Connections on demand, and their end: whole services on hosts in memory."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from fabric.app.connector import MemberConnector
from fabric.app.neighbour_keeper import RELEASE, NeighbourKeeper
from fabric.app.neighbours import Neighbours
from fabric.app.peer_book import PeerBook
from fabric.core.errors import Unavailable
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.budget_config import BudgetConfig
from fabric.net.data_config import RpcConfig
from fabric.net.memory_host import MemoryNetwork
from fabric.net.pacing import SocketRegistry
from fabric.net.ports import ALLOWED, PROTOCOL_RPC
from fabric.net.rpc import open_rpc

pytestmark = pytest.mark.slow

LIMIT, IDLE = 4, 30.0
QUIET = RpcConfig(ping_interval_seconds=20.0, dead_after_seconds=60.0)


class OpenGate:
    def allows(self, peer, protocol):
        return ALLOWED


class Peer:
    """What a daemon has of connections, with members that are told to it."""

    def __init__(self, network, number):
        signer = Ed25519Signer(bytes([number + 1]) * 32)
        self.id = signer.peer_id
        self.host = network.host(signer, OpenGate())
        self.core = Neighbours(self.id, LIMIT)
        self.kept = frozenset()
        self.members = {}
        self.lost = []

    def tell(self, peers):
        self.members = {peer.id: peer.host.addrs() for peer in peers}
        self.core.set_members(self.members)

    def current(self):
        return self.core.chosen()

    async def ensure(self, peer):
        pass

    seek = ensure

    async def connect(self, peer, kinds):
        """Carry RPC on streams of the host, which the connector opens."""
        return await self.connector.open_stream(peer, PROTOCOL_RPC), "direct"

    async def _accept(self, peer, stream):
        await self.rpc.accept(peer, stream)
        await trio.sleep_forever()

    @asynccontextmanager
    async def run(self):
        async with open_rpc(QUIET, self.id, self, OpenGate(), Counters()) as self.rpc:
            self.rpc.background = frozenset({RELEASE})
            self.rpc.register("x.echo", lambda peer, request: request)
            self.rpc.register_async("x.sleep", self._sleep)
            self.host.set_handler(PROTOCOL_RPC, self._accept)
            self.connector = MemberConnector(
                self.host,
                self,
                PeerBook(self.id),
                lambda: self.members,
                ready=self.rpc.connected,
                greet=lambda peer: self.rpc.call(peer, "x.echo", b""),
                blocked=frozenset,
                timeout_seconds=5,
                chosen=self.current,
            )
            self.rpc.meet = self.connector.reach
            keeper = NeighbourKeeper(
                self,
                self.host,
                self.rpc,
                SocketRegistry(BudgetConfig()),
                lambda: self.kept,
                IDLE,
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keeper.run)
                nursery.start_soon(self._note_lost)
                await nursery.start(self.connector.run)
                yield
                nursery.cancel_scope.cancel()

    async def _note_lost(self):
        async for peer in self.rpc.lost():
            self.lost.append(peer)

    async def _sleep(self, peer, request):
        await trio.sleep(float(request))
        return request


@asynccontextmanager
async def mesh(count):
    network = MemoryNetwork(7)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(network.run())
        peers = [Peer(network, number) for number in range(count)]
        for peer in peers:
            await stack.enter_async_context(peer.run())
        for peer in peers:
            peer.tell(peers)
        yield network, peers


def far_from(peer, peers):
    return next(p for p in peers if p is not peer and p.id not in peer.current())


async def test_idle_connections_end_when_both_sides_agree(autojump_clock):
    async with mesh(9) as (_, peers):
        async with trio.open_nursery() as nursery:
            for one in peers:
                for other in peers:
                    if one is not other:
                        nursery.start_soon(one.rpc.call, other.id, "x.echo", b"")
        assert all(len(peer.rpc.connected()) == 8 for peer in peers)
        await trio.sleep(4 * IDLE)
        for peer in peers:
            assert peer.current() <= peer.rpc.connected() == peer.host.connected()
            assert len(peer.rpc.connected()) <= LIMIT
        assert [peer.lost for peer in peers] == [[]] * 9  # nobody took it for a loss


async def test_who_is_no_neighbour_is_connected_for_as_long_as_it_is_used(
    autojump_clock,
):
    async with mesh(9) as (_, peers):
        await trio.sleep(IDLE)
        one = max(peers, key=lambda peer: len(peer.current()))
        assert len(one.current()) == LIMIT  # it has no room for one more
        far = far_from(one, peers)
        assert far.id not in one.rpc.connected()
        assert await one.rpc.call(far.id, "x.echo", b"hello") == b"hello"
        with trio.fail_after(10 * IDLE):
            assert await one.rpc.call(far.id, "x.sleep", b"100")
            assert far.id in one.rpc.connected()
        one.kept = frozenset({far.id})
        await trio.sleep(4 * IDLE + 1)  # nobody asks at this moment
        assert far.id in one.rpc.connected()  # a job needs it
        one.kept, far.kept = frozenset(), frozenset({one.id})
        await trio.sleep(4 * IDLE)
        assert far.id in one.rpc.connected()  # a job there needs it
        far.kept = frozenset()
        await trio.sleep(4 * IDLE)
        assert far.id not in one.rpc.connected() | one.host.connected()
        assert one.lost == far.lost == []


async def test_a_neighbour_that_dies_is_lost_and_one_far_away_is_not_reached(
    autojump_clock,
):
    async with mesh(9) as (network, peers):
        await trio.sleep(IDLE)
        ghost = peers[3]
        near = [p for p in peers if p is not ghost and ghost.id in p.rpc.connected()]
        network.kill(ghost.id)
        await trio.sleep(1)
        assert near
        assert all(peer.lost == [ghost.id] for peer in near)
        far = far_from(ghost, peers)
        assert far.lost == []
        with pytest.raises(Unavailable):
            await far.rpc.call(ghost.id, "x.echo", b"")
