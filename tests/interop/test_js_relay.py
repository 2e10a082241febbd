"""js-libp2p uses our relay: it reserves a slot, and is dialled through it."""

from contextlib import asynccontextmanager

import pytest
import trio

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import BUGS, Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from nat.relay.circuit_service import CircuitService
from nat.relay.config import CircuitConfig, RelayConfig
from nat.relay.service import RelayService
from tests.net.check_host import ListGate, echo

ECHO = "/fabric/interop/echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SECONDS = 15
pytestmark = [pytest.mark.slow, pytest.mark.root]


@asynccontextmanager
async def ours():
    """A host that serves echo, its signer and counters, and a nursery for services."""
    counters, signer, gate = Counters(), Ed25519Signer.generate(), ListGate()
    config = HostConfig(listen=(LOOPBACK,))
    async with open_host(config, signer, gate, counters) as host:
        host.set_handler(ECHO, echo)
        async with trio.open_nursery() as nursery:
            yield host, signer, nursery
            nursery.cancel_scope.cancel()
    assert counters.snapshot().get(BUGS, 0) == 0


@asynccontextmanager
async def relaying(*, members=True):
    """Our relay, and its address; ``members``: what it takes everybody for."""
    async with ours() as (host, signer, nursery):
        config = RelayConfig(volunteer="always")
        service = RelayService(
            host, signer, lambda peer: members, config, host.counters
        )
        await nursery.start(service.run)
        yield service, host.addrs()[0]


@asynccontextmanager
async def relayed():
    """A host of ours that can be relayed, and the addresses it then announces."""
    async with ours() as (host, _, nursery):
        told, heard = trio.open_memory_channel(8)

        async def no_data(sock, *_):
            sock.close()

        service = CircuitService(
            host,
            ListGate(),
            CircuitConfig(num_relays=1),
            host.counters,
            addresses_of=lambda peer: (),
            on_data=no_data,
            on_addresses=told.send_nowait,
        )
        await nursery.start(service.run)
        yield host, service, heard


async def reserve(node, address):
    """Let a js node reserve a slot; return the address others dial."""
    answer = await node.call("reserve", relay=address)
    (circuit,) = [addr for addr in answer["addrs"] if "/p2p-circuit" in addr]
    assert circuit.startswith(address)
    return circuit


@pytest.mark.parametrize("security", ["noise", "tls"])
async def test_js_reaches_js_through_our_relay(js, security):
    async with (
        relaying() as (relay, address),
        js(security=[security]) as callee,
        js(security=[security]) as caller,
    ):
        circuit = await reserve(callee, address)
        dialled = await caller.call("dial", address=circuit)
        assert dialled["peer"] == callee.peer
        assert not dialled["limited"]
        answer = await caller.call("echo", address=circuit, text="x" * 100_000)
        assert answer["text"] == "x" * 100_000
        assert len(relay.book.circuits) == 1


async def test_a_stranger_is_told_the_limits_of_its_circuit(js):
    async with (
        relaying(members=False) as (_, address),
        js(security=["noise"]) as callee,
        js(security=["noise"]) as caller,
    ):
        circuit = await reserve(callee, address)
        dialled = await caller.call("dial", address=circuit)
        assert dialled["limited"]
        answer = await caller.call("echo", address=circuit, text="hello")
        assert answer["text"] == "hello"


async def test_we_reach_js_through_our_relay(js):
    async with (
        relaying() as (_, address),
        js(security=["noise"]) as callee,
        relayed() as (host, _, _),
    ):
        circuit = await reserve(callee, address)
        with trio.fail_after(SECONDS):
            await host.connect(callee.peer, [circuit])
            (info,) = host.connections(callee.peer)
            assert info.kind == "relay"
            async with await host.open_stream(callee.peer, ECHO) as stream:
                await stream.send_all(b"through the relay")
                assert await stream.receive_some() == b"through the relay"


async def test_js_reaches_us_through_our_relay(js):
    async with (
        relaying() as (_, address),
        relayed() as (host, circuits, heard),
        js(security=["noise"]) as caller,
    ):
        relay = address.rpartition("/p2p/")[2]
        circuits.set_candidates({relay: (address,)})
        with trio.fail_after(SECONDS):
            (announced,) = await heard.receive()
        circuit = f"{announced}/p2p/{host.peer_id}"
        dialled = await caller.call("dial", address=circuit)
        assert dialled["peer"] == host.peer_id
        answer = await caller.call("echo", address=circuit, text="hello")
        assert answer["text"] == "hello"
        (info,) = host.connections(caller.peer)
        assert info.kind == "relay"
