"""libp2p TLS next to Noise in whole hosts, and against py-libp2p's own."""

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.security.tls.transport import PROTOCOL_ID, TLSTransport
from multiaddr import Multiaddr

from fabric.core.errors import IntegrityError
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_tls import TLS_PROTOCOL
from tests.net.check_host import ECHO, ListGate, echo

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SECONDS = 10
pytestmark = pytest.mark.slow


async def test_a_handshake_that_drips_ends_at_the_upgrade_limit_and_is_counted():
    counters = Counters()
    config = HostConfig(listen=(LOOPBACK,), upgrade_seconds=0.5)
    signer = Ed25519Signer.generate()
    async with open_host(config, signer, ListGate(), counters) as host:
        port = int(host.addrs()[0].split("/")[4])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(framed("/multistream/1.0.0") + framed(TLS_PROTOCOL))
            with trio.fail_after(SECONDS):
                await stream.send_all(b"\x16\x03")  # and never the rest
                while await stream.receive_some():
                    pass
    assert counters.snapshot()[f"{REFUSALS}:E_TLS_TIMEOUT"] == 1


def framed(protocol):
    return bytes([len(protocol) + 1]) + protocol.encode() + b"\n"


def ours(counters=None):
    return open_host(
        HostConfig(listen=(LOOPBACK,)),
        Ed25519Signer.generate(),
        ListGate(),
        counters or Counters(),
    )


def secured_by(host, peer):
    network = host.basic.get_network()
    return network.get_connections(ID.from_base58(peer))[0].muxed_conn.secured_conn


async def test_two_of_ours_use_noise():
    async with ours() as one, ours() as two:
        await one.connect(two.peer_id, two.addrs())
        assert type(secured_by(one, two.peer_id)).__name__ == "NoiseSession"


def tls_only():
    """py-libp2p as it comes, with its own TLS transport and nothing else."""
    keys = create_new_key_pair()
    return new_host(key_pair=keys, sec_opt={PROTOCOL_ID: TLSTransport(keys)})


async def test_py_libp2ps_own_tls_dials_us_and_is_dialled():
    listen = [Multiaddr(LOOPBACK)]
    theirs = tls_only()
    async with theirs.run(listen_addrs=listen), ours() as host:
        their_id = str(theirs.get_id())
        with trio.fail_after(SECONDS):
            host.set_handler(ECHO, echo)
            await host.connect(their_id, [str(theirs.get_addrs()[0])])
            assert type(secured_by(host, their_id)).__name__ == "TlsSession"
            async with await host.open_stream(their_id, "/ipfs/ping/1.0.0") as ping:
                assert len(host.channel_binding(their_id, ping)) == 32
            stream = await theirs.new_stream(
                ID.from_base58(host.peer_id), [TProtocol(ECHO)]
            )
            await stream.write(b"over tls")
            assert await stream.read(8) == b"over tls"
            await host.disconnect(their_id)
    theirs = tls_only()
    async with theirs.run(listen_addrs=[]), ours() as host:
        host.set_handler(ECHO, echo)
        with trio.fail_after(SECONDS):
            await theirs.get_network().dial_addr(
                Multiaddr(host.addrs()[0].partition("/p2p/")[0]),
                ID.from_base58(host.peer_id),
            )
            stream = await theirs.new_stream(
                ID.from_base58(host.peer_id), [TProtocol(ECHO)]
            )
            await stream.write(b"over tls")
            assert await stream.read(8) == b"over tls"


async def test_a_tls_peer_that_is_another_is_an_integrity_error():
    theirs = tls_only()
    async with theirs.run(listen_addrs=[Multiaddr(LOOPBACK)]), ours() as host:
        addr = str(theirs.get_addrs()[0]).partition("/p2p/")[0]
        with trio.fail_after(SECONDS), pytest.raises(IntegrityError) as error:
            await host.connect(Ed25519Signer.generate().peer_id, [addr])
        assert error.value.code == "E_WRONG_PEER"
