"""Meeting a member: dial, attest, RPC; and again when it forgot us."""

import pytest
import trio
import trio.testing

from fabric.app.connector import MemberConnector, RedialingConnector
from fabric.app.peer_book import PeerBook
from fabric.core.errors import NoRoute, RemoteRefused
from fabric.core.ids import PeerId
from fabric.net.ports import ALL_PATHS

PEER, ADDR = PeerId("peer"), "/ip4/127.0.0.1/tcp/1/p2p/peer"


class World:
    """A host, an admission and an RPC that do what they are told."""

    def __init__(self, *, knows_us=True, admits=True, up=True):
        self.knows_us, self.admits, self.up = knows_us, admits, up
        self.live, self.did = set(), []

    def connected(self):
        return frozenset(self.live)

    async def connect(self, peer, addrs):
        self.did.append("dial")
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

    def connector(self):
        return MemberConnector(
            self,
            self,
            PeerBook(PeerId("me")),
            dict,
            ready=frozenset,
            greet=self.greet,
            blocked=frozenset,
            timeout_seconds=5,
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


class Plane:
    async def connect(self, peer, kinds):
        return trio.testing.memory_stream_pair()[0]


async def test_rpc_dials_a_known_peer_first_and_says_that_nobody_listens():
    world, book = World(), PeerBook(PeerId("me"))
    book.learn({PEER: [ADDR]})
    connector = RedialingConnector(world, Plane(), book)
    await connector.connect(PEER, ALL_PATHS)
    await connector.connect(PEER, ALL_PATHS)
    assert world.did == ["dial"]
    world.live.clear()
    world.up = False
    with pytest.raises(NoRoute):
        await connector.connect(PEER, ALL_PATHS)
