"""py-libp2p's own relay v2 with ours: as clients of our relay, as a relay for us."""

from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.relay.circuit_v2.config import RelayConfig as StockConfig
from libp2p.relay.circuit_v2.config import RelayRole
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID, CircuitV2Protocol
from libp2p.relay.circuit_v2.resources import RelayLimits
from libp2p.relay.circuit_v2.transport import CircuitV2Transport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from fabric.core.errors import NoRoute
from fabric.core.ids import PeerId
from nat.relay.messages import Limit
from tests.nat.relay.relay_network import SECONDS, client, relay, reserved, until
from tests.net.check_host import echo

ECHO = "/fabric/echo/1"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DEFAULT_LIMITS = RelayLimits(
    duration=120, data=128 << 10, max_circuit_conns=8, max_reservations=8
)


class Stock:
    """A py-libp2p host with its relay protocol."""

    def __init__(self, host, protocol):
        roles = RelayRole.STOP | RelayRole.CLIENT
        self.host = host
        self.id = PeerId(str(host.get_id()))
        self.protocol = protocol
        self.transport = CircuitV2Transport(host, protocol, StockConfig(roles=roles))

    def addrs(self):
        return tuple(str(addr) for addr in self.host.get_addrs())

    async def connect(self, other):
        addr = Multiaddr(other.host.listen_addrs()[0])
        await self.host.connect(PeerInfo(ID.from_base58(other.id), [addr]))


@asynccontextmanager
async def stock(*, hop=False):
    host = new_host(key_pair=create_new_key_pair())
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        protocol = CircuitV2Protocol(host, DEFAULT_LIMITS, allow_hop=hop)
        async with background_trio_service(protocol):
            await protocol.event_started.wait()
            yield Stock(host, protocol)
        await host.close()


async def test_a_stock_client_reserves_at_our_relay_and_is_dialled_through_it():
    async with relay() as hub, stock() as theirs, client() as ours:
        with trio.fail_after(SECONDS):
            await theirs.connect(hub)
            stream = await theirs.host.new_stream(ID.from_base58(hub.id), [PROTOCOL_ID])
            relay_id = ID.from_base58(hub.id)
            assert await theirs.transport._make_reservation(stream, relay_id)
            assert hub.relay.book.num_reservations == 1

            async def shout(stream):
                await stream.write((await stream.read(5)).upper())
                await stream.close()

            theirs.host.set_stream_handler(TProtocol(ECHO), shout)
            circuit = f"{hub.host.addrs()[0]}/p2p-circuit/p2p/{theirs.id}"
            await ours.host.connect(theirs.id, [circuit])
            assert ours.host.connections(theirs.id)[0].relay == hub.id
            async with await ours.host.open_stream(theirs.id, ECHO) as stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some(5) == b"HELLO"


async def test_a_stock_client_dials_ours_through_our_relay():
    async with relay() as hub, client() as ours, stock() as theirs:
        await reserved(ours, hub)
        ours.host.set_handler(ECHO, echo)
        with trio.fail_after(SECONDS):
            await theirs.connect(hub)
            info = PeerInfo(
                ID.from_base58(hub.id), [Multiaddr(hub.host.listen_addrs()[0])]
            )
            raw = await theirs.transport.dial_peer_info(
                PeerInfo(ID.from_base58(ours.id), []), relay_info=info
            )
            await theirs.host.upgrade_outbound_connection(raw, ID.from_base58(ours.id))
            stream = await theirs.host.new_stream(
                ID.from_base58(ours.id), [TProtocol(ECHO)]
            )
            await stream.write(b"hello")
            assert await stream.read(5) == b"hello"
        await until(lambda: ours.host.connections(theirs.id))
        assert ours.host.connections(theirs.id)[0].relay == hub.id


async def test_our_clients_use_a_stock_relay_for_signalling():
    async with stock(hop=True) as hub, client() as one, client() as two:
        two.circuits.set_candidates({hub.id: hub.addrs()})
        await until(lambda: two.announced)
        (known,) = two.circuits.reservations.status()
        assert known.held
        assert not known.data
        held = two.circuits.reservations._relays[hub.id]
        assert held.limit == Limit(duration_seconds=120, data_bytes=128 << 10)
        two.host.set_handler(ECHO, echo)
        circuits = [addr for addr in two.host.addrs() if "/p2p-circuit" in addr]
        with trio.fail_after(SECONDS):
            await one.host.connect(two.id, circuits)
            async with await one.host.open_stream(two.id, ECHO) as stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some(5) == b"hello"
            one.addresses[two.id] = two.announced
            with pytest.raises(NoRoute, match="signalling only"):
                await one.circuits.open_data(two.id)
