"""A control plane in memory and a store of grants in a dictionary."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from attestation.admission import Local, Software
from attestation.config import AttestationConfig
from attestation.gate import MembershipGate
from attestation.ports import AdmissionPorts, MemoryVerdicts
from attestation.service import AdmissionService
from attestation.software import AppraisalPolicy
from attestation.standings import Standings
from fabric.core.digest import digest
from fabric.core.errors import Unavailable
from fabric.core.ids import MeshId
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.host import PeerConnected, PeerDisconnected
from fabric.net.ports import ALLOWED, Decision

MESH = MeshId("ab" * 32)


class FakeHost:
    """One end of :class:`Network`."""

    def __init__(self, network, peer_id):
        self.network, self.peer_id = network, peer_id
        self.handlers = {}
        self.links = set()
        self.bindings = {}
        self._events = []

    def connected(self):
        return frozenset(self.links)

    def events(self):
        send, receive = trio.open_memory_channel(64)
        self._events.append(send)
        return receive

    def emit(self, event):
        for send in self._events:
            send.send_nowait(event)

    def set_handler(self, protocol, handler):
        self.handlers[protocol] = handler

    async def open_stream(self, peer, protocol):
        if peer not in self.links:
            raise Unavailable("not connected")
        mine, theirs = trio.testing.memory_stream_pair()
        far = self.network.hosts[peer]
        self.network.nursery.start_soon(far.answer, self.peer_id, protocol, theirs)
        return mine

    async def answer(self, peer, protocol, stream):
        async with stream:
            await self.handlers[protocol](peer, stream)

    def channel_binding(self, peer, stream):
        if peer not in self.links:
            raise Unavailable("not connected")
        default = digest("".join(sorted((peer, self.peer_id))).encode())
        return self.bindings.get(peer, default)


class Network:
    def __init__(self, nursery):
        self.nursery, self.hosts = nursery, {}

    def host(self, peer):
        return self.hosts.setdefault(peer, FakeHost(self, peer))

    def connect(self, a, b):
        self.hosts[a].links.add(b)
        self.hosts[b].links.add(a)
        self.hosts[a].emit(PeerConnected(b))
        self.hosts[b].emit(PeerConnected(a))

    def disconnect(self, a, b):
        self.hosts[a].links.discard(b)
        self.hosts[b].links.discard(a)
        self.hosts[a].emit(PeerDisconnected(b))
        self.hosts[b].emit(PeerDisconnected(a))


@dataclass
class Grants:
    """The store of grants of one node: an entry is ``member:<peer>`` in bytes."""

    entries: set[bytes] = field(default_factory=set)
    credential: list[bytes] = field(default_factory=list)
    refusal: Decision = field(default_factory=lambda: Decision(allowed=False))

    def membership(self, peer):
        return ALLOWED if f"member:{peer}".encode() in self.entries else self.refusal

    def ingest(self, entries):
        self.entries.update(e for e in entries if e.startswith(b"member:"))


class Node:
    """Everything admission of one peer consists of."""

    def __init__(self, network, *, config=None, allowed=frozenset(), mesh=MESH):
        self.signer = Ed25519Signer.generate()
        self.peer = self.signer.peer_id
        self.host = network.host(self.peer)
        self.grants, self.verdicts = Grants(), MemoryVerdicts()
        self.counters = Counters()
        self.config = config or AttestationConfig(seek_on_connect=False)
        self.standings = Standings(self.config.reattest_interval_seconds)
        ports = AdmissionPorts(
            membership=self.grants.membership,
            credential=lambda: self.grants.credential,
            ingest_untrusted=self.grants.ingest,
            authority_entries=lambda: sorted(self.grants.entries),
            verdicts=self.verdicts,
        )
        software = Software(b"\7" * 32, "0.1.0", AppraisalPolicy(allowed))
        self.service = AdmissionService(
            self.host,
            Local(self.signer, mesh, software),
            ports,
            self.standings,
            self.config,
            self.counters,
            rng=random.Random(1),
        )
        self.gate = MembershipGate(
            self.grants.membership,
            self.verdicts,
            self.standings,
            trio.current_time,
            own=self.peer,
        )

    def entry(self):
        return f"member:{self.peer}".encode()

    def state(self, other):
        return self.standings.of(other.peer, trio.current_time()).state


@pytest.fixture
async def network():
    async with trio.open_nursery() as nursery:
        yield Network(nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
def make_node():
    return Node


@pytest.fixture
async def pair(network):
    """A joiner with a credential, and a verifier that is a member; connected."""
    joiner, verifier = Node(network), Node(network)
    verifier.grants.entries.add(verifier.entry())
    joiner.grants.credential.append(joiner.entry())
    for node in (joiner, verifier):
        await network.nursery.start(node.service.run)
    network.connect(joiner.peer, verifier.peer)
    return joiner, verifier
