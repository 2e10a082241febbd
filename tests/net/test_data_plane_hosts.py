"""The data plane on both hosts: RPC, bulk and worker sockets between two daemons."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from fabric.core.errors import NoRoute
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.bulk_paths import open_bulk_paths
from fabric.net.config import HostConfig
from fabric.net.data_config import DataConfig, RpcConfig
from fabric.net.data_plane import open_data_plane
from fabric.net.libp2p_host import open_host
from fabric.net.memory_host import MemoryNetwork
from fabric.net.ports import ALLOWED
from fabric.net.rpc import open_rpc
from tests.net.test_libp2p_host import port_of

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
SIGNERS = Ed25519Signer(b"a" * 32), Ed25519Signer(b"b" * 32)


class OpenGate:
    def allows(self, peer, protocol):
        return ALLOWED


class OnlyOnePort:
    """A path provider whose firewall lets out one port."""

    def __init__(self, port):
        self.port = port

    def rank(self, peer, addresses):
        return tuple(a for a in addresses if a.endswith(f":{self.port}"))

    def claim(self, label, sock):
        return False

    async def punch(self, peer):
        raise NoRoute("everything else is closed")

    async def circuit(self, peer):
        raise NoRoute("there is no relay")


@asynccontextmanager
async def memory_hosts():
    async with MemoryNetwork(1).run() as network:
        yield [network.host(signer, OpenGate()) for signer in SIGNERS]


@asynccontextmanager
async def libp2p_hosts():
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                open_host(LOOPBACK, signer, OpenGate(), Counters())
            )
            for signer in SIGNERS
        ]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [memory_hosts, libp2p_hosts])
async def test_rpc_and_bulk_over_offers_of_a_real_host(hosts):
    config, gate, counters = DataConfig(), OpenGate(), Counters()
    with trio.fail_after(20):
        async with hosts() as (one, two), AsyncExitStack() as stack:
            enter = stack.enter_async_context
            services = []
            for signer, host in zip(SIGNERS, (one, two), strict=True):
                plane = await enter(
                    open_data_plane(config, signer, host, gate, counters)
                )
                rpc = await enter(
                    open_rpc(config.rpc, host.peer_id, plane, gate, counters)
                )
                plane.serve_rpc(rpc.accept)
                services.append((rpc, await enter(open_bulk_paths(plane))))
            await one.connect(two.peer_id, two.addrs())
            (rpc_one, bulk_one), (rpc_two, bulk_two) = services
            rpc_one.register("x.who", lambda peer, request: peer.encode())
            rpc_two.register("x.who", lambda peer, request: peer.encode())
            assert await rpc_one.call(two.peer_id, "x.who", b"") == (
                one.peer_id.encode()
            )
            assert await rpc_two.call(one.peer_id, "x.who", b"") == (
                two.peer_id.encode()
            )
            bulk_one.serve_bulk("x", lambda sock, peer: sock.sendall(peer.encode()))
            sock = await bulk_two.dial_bulk(one.peer_id, "x")
            buffer = bytearray(52)
            await trio.to_thread.run_sync(sock.recv_into, buffer)
            sock.close()
            assert buffer.decode() == two.peer_id


@pytest.mark.slow
async def test_where_only_the_control_planes_port_is_reached_labels_go_there():
    """A firewall that lets out port 443 alone: nothing else of the peer answers."""
    unreachable = DataConfig(listen="127.0.0.2:0")
    with trio.fail_after(20):
        async with libp2p_hosts() as (one, two), AsyncExitStack() as stack:
            enter, gate, counters = stack.enter_async_context, OpenGate(), Counters()
            planes = [
                await enter(open_data_plane(unreachable, signer, host, gate, counters))
                for signer, host in zip(SIGNERS, (one, two), strict=True)
            ]
            services = [
                await enter(open_rpc(RpcConfig(), host.peer_id, plane, gate, counters))
                for host, plane in zip((one, two), planes, strict=True)
            ]
            for plane, rpc in zip(planes, services, strict=True):
                plane.serve_rpc(rpc.accept)
                plane.set_path_provider(OnlyOnePort(port_of(two)))
            services[1].register("x.who", lambda peer, request: peer.encode())
            await one.connect(two.peer_id, two.addrs())
            answer = await services[0].call(two.peer_id, "x.who", b"")
            assert answer == one.peer_id.encode()
            assert services[0].kind(two.peer_id) == "direct"
            # and the port still serves what it is there for
            async with await one.open_stream(two.peer_id, "/ipfs/ping/1.0.0") as ping:
                await ping.send_all(b"x" * 32)
                assert await ping.receive_some(32)
