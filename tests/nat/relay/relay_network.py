"""Real hosts on loopback with relay and circuit services, for tests of relaying."""

from contextlib import asynccontextmanager

import trio

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import BUGS, Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.ports import ALLOWED, Decision
from nat.relay.circuit_service import CircuitService
from nat.relay.config import CircuitConfig, RelayConfig
from nat.relay.service import RelayService

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SECONDS = 15
FAST = {
    "max_bytes_per_second": 1e12,
    "max_bytes_per_second_per_peer": 1e12,
    "max_bytes_per_second_per_circuit": 1e12,
}
OPEN = ("/libp2p/", "/ipfs/", "/fabric/attest/")


class MemberGate:
    """Admits all but those on its list, who get what is open to everyone."""

    def __init__(self):
        self.strangers = set()

    def allows(self, peer, protocol):
        if peer in self.strangers and not protocol.startswith(OPEN):
            return Decision(False, "E_NOT_ADMITTED", "not admitted", "attest first")
        return ALLOWED


class Peer:
    """A host with what a test wants to know about it."""

    def __init__(self, host, signer, gate, counters):
        self.host = host
        self.signer = signer
        self.gate = gate
        self.counters = counters
        self.id = host.peer_id
        self.addresses = {}
        self.neighbours = ()
        self.announced = ()
        self.sockets, self.arrived = trio.open_memory_channel(64)
        self.relay = self.circuits = None

    def counted(self, name):
        return self.counters.snapshot().get(name, 0)

    async def on_data(self, peer, sock):
        self.sockets.send_nowait((peer, sock))

    def on_addresses(self, addrs):
        self.announced = addrs
        self.host.announce([*addrs, *self.host.listen_addrs()])


@asynccontextmanager
async def peer(**settings):
    signer, gate, counters = Ed25519Signer.generate(), MemberGate(), Counters()
    config = HostConfig(listen=(LOOPBACK,), **settings)
    async with open_host(config, signer, gate, counters) as host:
        yield Peer(host, signer, gate, counters)
        assert counters.snapshot().get(BUGS, 0) == 0


@asynccontextmanager
async def relay(host_settings=None, **settings):
    """A relay that runs."""
    async with peer(**(host_settings or {})) as made:
        settings.setdefault("volunteer", "always")
        made.relay = RelayService(
            made.host,
            made.signer,
            lambda who: made.gate.allows(who, "/fabric/rpc/1").allowed,
            RelayConfig(**settings),
            made.counters,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(made.relay.run)
            yield made
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def client(**settings):
    """A peer that uses relays."""
    async with peer() as made:
        made.circuits = CircuitService(
            made.host,
            made.gate,
            CircuitConfig(**settings),
            made.counters,
            addresses_of=lambda who: made.addresses.get(who, ()),
            neighbours=lambda who: made.neighbours,
            on_data=made.on_data,
            on_addresses=made.on_addresses,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(made.circuits.run)
            yield made
            nursery.cancel_scope.cancel()


async def until(true):
    with trio.fail_after(SECONDS):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def reserved(who, *relays):
    """Let ``who`` hold reservations at ``relays``."""
    who.circuits.set_candidates({r.id: r.host.addrs() for r in relays})
    await until(lambda: sum(s.held for s in who.circuits.reservations.status()) > 0)
    wanted = min(len(relays), 2)
    await until(
        lambda: sum(s.held for s in who.circuits.reservations.status()) >= wanted
    )
    await until(lambda: who.announced)


def stream_of(sock):
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def data_circuit(one, two):
    """Return both ends of a data circuit as streams."""
    one.addresses[two.id] = two.announced
    with trio.fail_after(SECONDS):
        near = await one.circuits.open_data(two.id)
        claimed, far = await two.arrived.receive()
    assert claimed == one.id
    return stream_of(near), stream_of(far)
