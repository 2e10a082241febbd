"""A mesh of keys, and the network of the store in memory."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import trio

from crdt_store.clock import stamp
from crdt_store.entry import Entry, sign_entry
from crdt_store.grants import CODEC, GRANT_PREFIX, Grant, Mesh, Record, create_mesh
from crdt_store.replica import Replica
from crdt_store.roles import Role
from fabric.core.errors import PeerTimeout, Unavailable
from fabric.core.ids import PeerId
from fabric.core.signing import Ed25519Signer
from tests.crdt_store.peers import Peers

NOW = 1_700_000_000.0
FOREVER = 0


def key_of(number: int) -> Ed25519Signer:
    return Ed25519Signer(number.to_bytes(32, "big"))


@dataclass
class World:
    """A mesh with root, owner, admin and workers; everyone's entries can be signed."""

    root: Ed25519Signer = field(default_factory=lambda: key_of(1))
    owner: Ed25519Signer = field(default_factory=lambda: key_of(2))
    admin: Ed25519Signer = field(default_factory=lambda: key_of(3))
    workers: list[Ed25519Signer] = field(
        default_factory=lambda: [key_of(n) for n in range(10, 14)]
    )
    stranger: Ed25519Signer = field(default_factory=lambda: key_of(99))
    now: float = NOW
    mesh: Mesh = field(init=False)
    founding: Entry = field(init=False)

    def __post_init__(self) -> None:
        self.mesh, self.founding = create_mesh(
            "lab", self.root, self.owner.peer_id, self.now - 100
        )

    def entry(
        self,
        signer: Ed25519Signer,
        key: str,
        value: bytes = b"v",
        *,
        at: float | None = None,
        hlc: int | None = None,
        ttl: int = FOREVER,
    ) -> Entry:
        when = stamp(self.now if at is None else at) if hlc is None else hlc
        return sign_entry(signer, self.mesh.id, key, when, ttl, value)

    def record(
        self,
        signer: Ed25519Signer,
        key: str,
        record: Record,
        *,
        at: float | None = None,
        ttl: int = FOREVER,
    ) -> Entry:
        return self.entry(signer, key, CODEC.encode(record), at=at, ttl=ttl)

    def grant(
        self,
        signer: Ed25519Signer,
        subject: Ed25519Signer,
        role: Role,
        *,
        at: float | None = None,
        **terms,
    ) -> Entry:
        when = self.now - 90 if at is None else at
        key = GRANT_PREFIX + subject.peer_id
        return self.record(signer, key, Grant(role, **terms), at=when)

    def authority(self) -> list[bytes]:
        """The founding grants: owner, admin, workers."""
        return list(_founding_grants())

    def replica(self, signer: Ed25519Signer | None = None, **bounds) -> Replica:
        """A replica that holds the founding grants."""
        own = (signer or self.owner).public_key
        replica = Replica(self.mesh, own, **bounds)
        replica.restore(self.authority(), self.now)  # signatures are tested elsewhere
        return replica


@lru_cache(maxsize=1)
def _founding_grants() -> tuple[bytes, ...]:
    world = World()
    entries = [
        world.founding,
        world.grant(world.owner, world.admin, Role.ADMIN, may_delegate=True),
        *(world.grant(world.owner, w, Role.WORKER) for w in world.workers),
    ]
    return tuple(entry.raw for entry in entries)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def make_world() -> Callable[[], World]:
    return World


class Network:
    """Rpc and Broadcast of several stores in one process, with cuts."""

    def __init__(self) -> None:
        self.stations: dict[PeerId, Station] = {}
        self.cut: set[frozenset[PeerId]] = set()
        self.calls: Counter[str] = Counter()
        self.lose_pushes = False

    def station(self, peer: PeerId) -> Station:
        self.stations[peer] = Station(self, peer)
        return self.stations[peer]

    def reachable(self, one: PeerId, other: PeerId) -> bool:
        return other in self.stations and frozenset({one, other}) not in self.cut

    def partition(self, side: set[PeerId]) -> None:
        self.cut = {
            frozenset({a, b})
            for a in self.stations
            for b in self.stations
            if (a in side) != (b in side)
        }

    def heal(self) -> None:
        self.cut = set()


class Station:
    """One peer's end: implements Rpc and Broadcast."""

    def __init__(self, network: Network, peer: PeerId) -> None:
        self.network = network
        self.peer = peer
        self.handlers: dict[str, Callable[[PeerId, bytes], Awaitable[bytes]]] = {}
        self.topics: dict[str, list[trio.MemorySendChannel]] = {}
        self.published: list[int] = []

    def register(self, method, handler) -> None:
        raise NotImplementedError

    def register_async(self, method, handler) -> None:
        self.handlers[method] = handler

    async def call(self, peer: PeerId, method: str, request: bytes) -> bytes:
        await trio.sleep(0.01)
        self.network.calls[method] += 1
        if not self.network.reachable(self.peer, peer):
            raise PeerTimeout("cut")
        handler = self.network.stations[peer].handlers.get(method)
        if handler is None:
            raise Unavailable("not serving")
        return await handler(self.peer, request)

    def connected(self) -> frozenset[PeerId]:
        return frozenset(
            p
            for p in self.network.stations
            if p != self.peer and self.network.reachable(self.peer, p)
        )

    def lost(self):
        return trio.open_memory_channel(1)[1]

    def rtt_seconds(self, peer: PeerId) -> float | None:
        return 0.01

    async def publish(self, topic: str, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()
        assert len(payload) <= 60 << 10
        self.published.append(len(payload))
        if self.network.lose_pushes:
            return
        for peer in self.connected():
            for channel in self.network.stations[peer].topics.get(topic, []):
                with contextlib.suppress(trio.WouldBlock, trio.BrokenResourceError):
                    channel.send_nowait((self.peer, payload))

    def subscribe(self, topic: str):
        sender, receiver = trio.open_memory_channel(64)
        self.topics.setdefault(topic, []).append(sender)
        return receiver


@pytest.fixture
def network() -> Iterator[Network]:
    return Network()


@pytest.fixture
async def peers(world, network, nursery):
    return Peers(world, network, nursery)
