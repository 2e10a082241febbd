"""Meeting a member: dial, attest, RPC; and again when it forgot us."""

import pytest
import trio
import trio.testing

from fabric.app.connector import SEEK_SECONDS, MemberConnector
from fabric.app.peer_book import PeerBook
from fabric.core.errors import NoRoute, RemoteRefused, Unavailable
from fabric.core.ids import PeerId
from fabric.net.ports import Decision
from fabric.net.traversal_api import ConnectionInfo

PEER, ADDR = PeerId("peer"), "/ip4/127.0.0.1/tcp/1/p2p/peer"


class World:
    """A host, an admission and an RPC that do what they are told."""

    def __init__(self, *, knows_us=True, admits=True, up=True):
        self.knows_us, self.admits, self.up = knows_us, admits, up
        self.live, self.did = set(), []
        self.dial_seconds = 0

    def connected(self):
        return frozenset(self.live)

    async def connect(self, peer, addrs):
        self.did.append("dial")
        await trio.sleep(self.dial_seconds)
        self.dialled = list(addrs)
        if not self.up:
            raise NoRoute("refused")
        self.live.add(peer)

    async def ensure(self, peer):
        self.did.append("ensure")

    async def seek(self, peer):
        self.did.append("seek")
        if not self.admits:
            raise RemoteRefused("no member", code="E_NOT_MEMBER")
        self.knows_us = True

    async def greet(self, peer):
        self.did.append("greet")
        if not self.knows_us:
            raise RemoteRefused("not served to us", code="E_PROTOCOL_REFUSED")

    async def open_stream(self, peer, protocol):
        self.did.append("open")
        if not self.knows_us:
            raise RemoteRefused("not served to us", code="E_PROTOCOL_REFUSED")
        return trio.testing.memory_stream_pair()[0]

    def connections(self, peer):
        return [ConnectionInfo(kind="direct", outbound=True, remote="127.0.0.1:2")]

    def connector(self, book=None, members=dict, **options):
        return MemberConnector(
            self,
            self,
            book or PeerBook(PeerId("me")),
            members,
            ready=lambda: frozenset(self.live),
            greet=self.greet,
            blocked=frozenset,
            timeout_seconds=5,
            **options,
        )


async def test_a_member_is_dialled_attested_and_greeted():
    world = World()
    await world.connector().meet(PEER, [ADDR])
    assert world.did == ["dial", "ensure", "greet"]


async def test_a_peer_that_forgot_us_is_shown_our_evidence_again():
    world = World(knows_us=False)
    await world.connector().meet(PEER, [ADDR])
    assert world.did == ["dial", "ensure", "greet", "seek", "greet"]


async def test_a_refusal_carries_the_reason_of_admission():
    world = World(knows_us=False, admits=False)
    with pytest.raises(RemoteRefused) as caught:
        await world.connector().meet(PEER, [ADDR])
    assert caught.value.code == "E_NOT_MEMBER"


async def test_who_is_needed_is_dialled_first_or_the_caller_hears_why_not():
    world, book = World(), PeerBook(PeerId("me"))
    book.learn({PEER: [ADDR]})
    connector = world.connector(book)
    async with await connector.open_stream(PEER, "/x/1"):
        assert world.did == ["dial", "ensure", "open"]
    await connector.reach(PEER)
    assert world.did.count("dial") == 1
    world.live.clear()
    world.up = False
    with pytest.raises(NoRoute):
        await connector.open_stream(PEER, "/x/1")
    assert book.contacts[PEER].last_error.code == "E_NO_ROUTE"


async def test_several_who_need_a_peer_dial_it_once(autojump_clock):
    world = World()
    world.dial_seconds = 1
    connector = world.connector(members=lambda: {PEER: [ADDR]})
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(connector.reach, PEER)
    assert world.did.count("dial") == 1
    assert not connector._dials


async def test_who_forgot_us_is_shown_our_evidence_but_not_with_each_call(
    autojump_clock,
):
    world = World(knows_us=False)
    connector = world.connector(members=lambda: {PEER: [ADDR]})
    async with await connector.open_stream(PEER, "/x/1"):
        assert world.did == ["dial", "ensure", "open", "seek", "open"]
    world.knows_us = world.admits = False
    with pytest.raises(RemoteRefused):
        await connector.open_stream(PEER, "/x/1")
    assert world.did.count("seek") == 1
    await trio.sleep(SEEK_SECONDS)
    with pytest.raises(RemoteRefused) as caught:
        await connector.open_stream(PEER, "/x/1")
    assert caught.value.code == "E_NOT_MEMBER"


async def test_who_may_not_be_met_is_not_dialled():
    world = World()
    refusal = Decision(allowed=False, code="E_REVOKED", reason="revoked")
    connector = world.connector(permit=lambda peer: refusal)
    with pytest.raises(Unavailable) as caught:
        await connector.reach(PEER)
    assert caught.value.code == "E_REVOKED"
    assert world.did == []


async def test_only_neighbours_are_dialled_unasked(autojump_clock):
    peers = {PeerId(f"peer-{n}"): [f"/ip4/10.0.0.{n}/tcp/1"] for n in range(20)}
    chosen = frozenset(sorted(peers)[:3])
    world, book = World(), PeerBook(PeerId("me"))
    stranger = PeerId("stranger")
    book.learn({stranger: [ADDR]})
    connector = world.connector(book, lambda: peers, chosen=lambda: chosen)
    async with trio.open_nursery() as nursery:
        await nursery.start(connector.run)
        await trio.sleep(30)
        # one hears of strangers while neighbours are missing
        assert chosen <= world.live <= chosen | {stranger}
        assert set(book.contacts) == chosen | {stranger}
        nursery.cancel_scope.cancel()
    other = next(iter(peers.keys() - chosen))
    await connector.reach(other)
    assert other in world.live


CIRCUIT = "/ip4/127.0.0.1/tcp/9/p2p/relay/p2p-circuit/p2p/peer"
OTHER = "/ip4/127.0.0.1/tcp/2/p2p/peer"


@pytest.mark.parametrize(
    ("kept", "dialled"),
    [
        ([OTHER, ADDR], [OTHER, ADDR, CIRCUIT]),
        ([OTHER], [OTHER, CIRCUIT]),
        ([], [CIRCUIT]),
    ],
)
async def test_ranked_addresses_are_dialled_and_circuits_always(kept, dialled):
    world = World()
    connector = world.connector(rank=lambda peer, addrs: kept)
    await connector.meet(PEER, [ADDR, OTHER, CIRCUIT])
    assert world.dialled == dialled


async def test_a_rank_that_likes_nothing_does_not_cut_a_peer_off():
    world = World()
    await world.connector(rank=lambda peer, addrs: ()).meet(PEER, [ADDR])
    assert world.dialled == [ADDR]


async def test_the_address_that_answered_is_remembered(autojump_clock):
    world, book = World(), PeerBook(PeerId("me"))
    connector = world.connector(
        book, lambda: {PEER: [ADDR, OTHER]}, connections=world.connections
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(connector.run)
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    successes = {k.addr: k.successes for k in book.contacts[PEER].known.all()}
    assert successes == {ADDR: 0, OTHER: 1}
    assert book.contacts[PEER].addrs[0] == OTHER


async def test_a_refusal_is_not_held_against_the_address(autojump_clock):
    world, book = World(knows_us=False, admits=False), PeerBook(PeerId("me"))
    connector = world.connector(book, lambda: {PEER: [ADDR]})
    async with trio.open_nursery() as nursery:
        await nursery.start(connector.run)
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert book.contacts[PEER].known.all()[0].failures == 0
    assert book.contacts[PEER].last_error.code == "E_NOT_MEMBER"


async def test_after_a_change_of_network_nobody_waits(autojump_clock):
    world, book = World(up=False), PeerBook(PeerId("me"))
    connector = world.connector(book, lambda: {PEER: [ADDR]})
    async with trio.open_nursery() as nursery:
        await nursery.start(connector.run)
        await trio.sleep(600)
        assert book.contacts[PEER].retry_at > trio.current_time() + 1
        world.up = True
        connector.retry_now()
        await trio.sleep(0.01)
        assert world.live == {PEER}
        nursery.cancel_scope.cancel()
