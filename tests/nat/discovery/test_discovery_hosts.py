"""Real hosts on loopback: islands merge, dead bootstraps hurt nobody, abuse is cut."""

import contextlib
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from libp2p.discovery.rendezvous.client import RendezvousClient as TheirClient
from libp2p.discovery.rendezvous.errors import RendezvousError
from libp2p.peer.id import ID

from fabric.app.connector import MemberConnector
from fabric.app.joining import join_any
from fabric.app.peer_book import PeerBook
from fabric.app.peers_file import PeersFile
from fabric.core.errors import NoRoute, RemoteRefused
from fabric.core.ids import MeshId
from fabric.core.protobuf import encode_varint
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import PROTOCOL_ERRORS, Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.ports import ALLOWED
from nat.discovery import rendezvous_service
from nat.discovery.config import DiscoveryConfig
from nat.discovery.core import namespace_of, order_points
from nat.discovery.rendezvous import PointLimits
from nat.discovery.rendezvous_messages import PROTOCOL_RENDEZVOUS
from nat.discovery.rendezvous_service import MAX_STREAMS, PointService, RendezvousClient
from nat.discovery.service import DiscoveryPorts, DiscoveryService

pytestmark = pytest.mark.slow
MESH = MeshId("a" * 64)
SECONDS = 15
QUICK = DiscoveryConfig(discover_seconds=0.5)


class OpenGate:
    """Admits everybody: admission is not what is tested here."""

    def allows(self, peer, protocol):
        return ALLOWED


async def until(done):
    """Return once ``done()`` holds; the caller bounds it."""
    while not done():
        await trio.testing.wait_all_tasks_blocked(0.01)


@asynccontextmanager
async def host(signer=None, listen=("/ip4/127.0.0.1/tcp/0",)):
    signer = signer or Ed25519Signer.generate()
    counters = Counters()
    async with open_host(
        HostConfig(listen=listen), signer, OpenGate(), counters
    ) as opened:
        opened.test_signer, opened.test_counters = signer, counters
        yield opened


class Peer:
    """A member as the daemon builds it, without what lies above connections."""

    def __init__(self, opened, mesh=MESH, config=QUICK):
        self.host = opened
        self.book = PeerBook(opened.peer_id)
        self.points = []
        self.connector = MemberConnector(
            opened,
            self,
            self.book,
            dict,
            ready=opened.connected,
            greet=self.ensure,
            blocked=frozenset,
            timeout_seconds=5,
            connections=opened.connections,
        )
        ports = DiscoveryPorts(
            candidates=lambda: order_points("ns", [self.points], opened.peer_id),
            addrs_of=self.book.addrs_of,
            is_member=lambda peer: True,
            learn=lambda found: self.book.learn(found, source="rendezvous"),
        )
        self.discovery = DiscoveryService(
            opened, opened.test_signer, mesh, config, ports
        )

    async def ensure(self, peer):
        """Trust everybody."""

    def invite(self, *others):
        for other in others:
            self.book.learn({other.host.peer_id: other.host.addrs()})

    def use_point(self, other):
        self.invite(other)
        self.points.append(other.host.peer_id)

    async def run(self, *, task_status=trio.TASK_STATUS_IGNORED):
        async with trio.open_nursery() as nursery:
            await nursery.start(self.connector.run)
            await nursery.start(self.discovery.run)
            task_status.started()


@asynccontextmanager
async def peers(count):
    async with AsyncExitStack() as stack:
        made = [Peer(await stack.enter_async_context(host())) for _ in range(count)]
        nursery = await stack.enter_async_context(trio.open_nursery())
        yield made, nursery
        nursery.cancel_scope.cancel()


def reached(one, *others):
    return {other.host.peer_id for other in others} <= one.host.connected()


async def test_two_islands_with_one_common_point_find_each_other():
    with trio.fail_after(SECONDS):
        async with peers(5) as ((point, a, b, c, d), nursery):
            a.invite(b)
            c.invite(d)
            for peer in (a, b, c, d):
                peer.use_point(point)
            for peer in (point, a, b, c, d):
                await nursery.start(peer.run)
            await until(lambda: all(reached(x, c, d) for x in (a, b)))
            await until(lambda: a.discovery.islands().unconnected == ())
            assert len(a.discovery.islands().found) == 3
            assert "no island" in a.discovery.islands().sentence


async def test_two_members_that_both_moved_find_each_other(tmp_path):
    """What each remembers of the other is dead; a common point knows better."""
    one, two = Ed25519Signer.generate(), Ed25519Signer.generate()
    async with host(one) as first, host(two) as second:
        before = {h.peer_id: h.addrs() for h in (first, second)}
    with trio.fail_after(SECONDS):
        async with host() as point, host(one) as first, host(two) as second:
            where, a, b = Peer(point), Peer(first), Peer(second)
            assert first.addrs() != before[first.peer_id]
            async with trio.open_nursery() as nursery:
                await nursery.start(where.discovery.run)
                for peer in (a, b):
                    peer.book.learn(before, source="record")
                    peer.use_point(where)
                    await nursery.start(peer.run)
                await until(lambda: reached(a, b) and reached(b, a))
                nursery.cancel_scope.cancel()


async def test_a_point_that_is_a_member_finds_the_island_that_registers_with_it():
    with trio.fail_after(SECONDS):
        async with peers(3) as ((point, friend, lost), nursery):
            point.invite(friend)
            lost.points.append(point.host.peer_id)
            lost.invite(point)
            await nursery.start(point.run)
            # registers, and is dialled back by the point, but does not dial itself
            await nursery.start(lost.discovery.run)
            await until(lambda: reached(point, friend, lost))
            await until(lambda: lost.host.peer_id in point.discovery.islands().found)


async def test_another_mesh_sees_nothing():
    async with host() as point, host() as ours, host() as theirs:
        PointService(point, PointLimits(), lambda peer: False)
        one = RendezvousClient(ours, ours.test_signer)
        two = RendezvousClient(theirs, theirs.test_signer)
        for opened in (ours, theirs):
            await opened.connect(point.peer_id, point.addrs())
        space = namespace_of(MESH)
        assert await one.register(point.peer_id, space, ours.addrs(), 600) == 600
        found, cookie = await one.discover(point.peer_id, space)
        assert [s.record.peer for s in found] == [ours.peer_id]
        assert ours.addrs()[0].startswith(found[0].record.addrs[0])
        other = namespace_of(MeshId("b" * 64))
        assert await two.discover(point.peer_id, other) != (found, cookie)
        with pytest.raises(RemoteRefused):
            await two.discover(point.peer_id, "")
        await one.unregister(point.peer_id, space)
        with trio.fail_after(SECONDS):
            while (await one.discover(point.peer_id, space))[0]:
                await trio.testing.wait_all_tasks_blocked(0.01)


async def test_py_libp2ps_client_uses_our_point():
    async with host() as point, host() as one, host() as two:
        service = PointService(point, PointLimits(), lambda peer: False)
        clients = []
        for opened in (one, two):
            await opened.connect(point.peer_id, point.addrs())
            clients.append(TheirClient(opened.basic, ID.from_base58(point.peer_id)))
        with trio.fail_after(SECONDS):
            for client in clients:
                assert await client.register("app", 7200) == 7200
            found, cookie = await clients[0].discover("app")
            assert {str(p.peer_id) for p in found} == {one.peer_id, two.peer_id}
            assert all(p.addrs for p in found)
            assert (await clients[0].discover("app", cookie=cookie))[0] == []
            with pytest.raises(RendezvousError):
                await clients[0].discover("app", cookie=b"nonsense")
            await clients[1].unregister("app")
            await until(lambda: len(service.point) == 1)


@pytest.mark.parametrize(
    "sent",
    [
        encode_varint(1 << 30),
        b"\xff" * 12,
        encode_varint(100) + b"short",
        encode_varint(3) + b"\xff\xff\xff",
        encode_varint(2) + b"\x08\x09",
    ],
    ids=["long", "endless", "truncated", "garbage", "unknown"],
)
async def test_malformed_requests_end_the_stream_and_are_counted(sent):
    async with host() as point, host() as bad:
        PointService(point, PointLimits(), lambda peer: False)
        await bad.connect(point.peer_id, point.addrs())
        with trio.fail_after(SECONDS):
            stream = await bad.open_stream(point.peer_id, PROTOCOL_RENDEZVOUS)
            await stream.send_all(sent)
            await stream.send_eof()
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some(1) == b""
        counted = point.test_counters.snapshot()
        assert sum(n for name, n in counted.items() if PROTOCOL_ERRORS in name) == 1


async def test_silent_clients_hold_a_bounded_number_of_places():
    async with host() as point, host() as slow, host() as good:
        service = PointService(point, PointLimits(), lambda peer: False)
        for opened in (slow, good):
            await opened.connect(point.peer_id, point.addrs())
        with trio.fail_after(SECONDS):
            held = [
                await slow.open_stream(point.peer_id, PROTOCOL_RENDEZVOUS)
                for _ in range(MAX_STREAMS + 5)
            ]
            await until(lambda: service.point.refused["BUSY"] == 5)
            assert service._limiter.borrowed_tokens == MAX_STREAMS
            for stream in held:
                await stream.aclose()
            await until(lambda: service._limiter.borrowed_tokens == 0)
            client = RendezvousClient(good, good.test_signer)
            assert await client.register(point.peer_id, "s", good.addrs(), 600)


async def test_a_silent_client_does_not_keep_its_place(monkeypatch):
    monkeypatch.setattr(rendezvous_service, "REQUEST_SECONDS", 0.3)
    async with host() as point, host() as slow:
        service = PointService(point, PointLimits(), lambda peer: False)
        await slow.connect(point.peer_id, point.addrs())
        with trio.fail_after(SECONDS):
            stream = await slow.open_stream(point.peer_id, PROTOCOL_RENDEZVOUS)
            await stream.send_all(b"\x20")  # and not what it announces
            assert await stream.receive_some() == b""
            await until(lambda: service._limiter.borrowed_tokens == 0)
            await stream.aclose()


async def test_killing_the_bootstraps_stops_no_newcomer():
    """A remaining member's invite still names the dead ones."""
    async with host() as stays, host() as new:
        async with host() as first, host() as second:
            dead = (*first.addrs(), *second.addrs())
            for bootstrap in (first, second):
                await stays.connect(bootstrap.peer_id, bootstrap.addrs())
        newcomer = Peer(new)
        invite = (*dead, *stays.addrs())
        with trio.fail_after(SECONDS):
            through = await join_any(invite, newcomer.connector.meet, seconds=5)
            assert through == stays.peer_id
            with pytest.raises(NoRoute) as error:
                await join_any(dead, newcomer.connector.meet, seconds=5)
        assert all(addr in error.value.reason for addr in dead)


async def test_a_remembered_peer_is_enough_after_a_restart(tmp_path):
    signer = Ed25519Signer.generate()
    path = tmp_path / "peers.json"
    async with host() as stays:
        async with host() as bootstrap, host(signer) as before:
            peer = Peer(before)
            file = PeersFile(path, peer.book)
            dead = bootstrap.addrs()
            async with trio.open_nursery() as nursery:
                await nursery.start(peer.connector.run)
                peer.book.learn({bootstrap.peer_id: dead})
                peer.book.learn({stays.peer_id: stays.addrs()}, source="record")
                with trio.fail_after(SECONDS):
                    await until(lambda: stays.peer_id in before.connected())
                nursery.cancel_scope.cancel()
            await file.save()
        async with host(signer) as after:
            peer = Peer(after)
            PeersFile(path, peer.book)
            peer.book.learn({bootstrap.peer_id: dead})
            async with trio.open_nursery() as nursery:
                await nursery.start(peer.connector.run)
                with trio.fail_after(SECONDS):
                    await until(lambda: stays.peer_id in after.connected())
                nursery.cancel_scope.cancel()
            error = peer.book.contacts[bootstrap.peer_id].last_error
            assert error is None or isinstance(error, NoRoute)
