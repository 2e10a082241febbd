from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import trio

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_dialback import DialBack
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_identify import identify
from nat.addresses import AddressClass
from nat.reachability.autonat_service import AutonatService
from nat.reachability.config import AutonatConfig, ReachabilityConfig
from nat.reachability.netwatch import NetworkChanged
from nat.reachability.service import Surroundings, open_reachability
from tests.net.check_host import ListGate

pytestmark = pytest.mark.slow
CONFIG = ReachabilityConfig(
    settle_seconds=0.05,
    first_retry_seconds=0.2,
    autonat=AutonatConfig(dial_seconds=2, request_seconds=5),
)
HERE = Surroundings(lambda: ("127.0.0.1/8",))


def host():
    config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    return open_host(config, Ed25519Signer.generate(), ListGate(), Counters())


class Unreachable(DialBack):
    """A server that nothing of ours lets through to."""

    async def tell(self, peer, ip, port, protocol, message):
        return await super().tell(peer, ip, 1, protocol, message)


@asynccontextmanager
async def mesh(num_servers, dial_back=None):
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(host())
        servers = []
        for _ in range(num_servers):
            server = await stack.enter_async_context(host())
            AutonatService(
                server,
                dial_back or DialBack(HostConfig()),
                CONFIG.autonat,
                server.counters,
            )
            servers.append(server)
        with trio.fail_after(20):
            yield client, servers


def reachability(client, network=None, around=HERE):
    return open_reachability(
        client, partial(identify, client), around, CONFIG, client.counters, network
    )


async def until(changes, wanted):
    async for verdict in changes:
        if wanted(verdict):
            return verdict
    raise AssertionError("the channel ended")


async def test_a_reachable_peer_learns_it_as_servers_come():
    async with mesh(3) as (client, servers):
        async with reachability(client) as service:
            changes = service.changes()
            assert service.verdict().status == "unknown"
            await client.connect(servers[0].peer_id, servers[0].addrs())
            first = await until(changes, lambda v: v.status == "public")
            assert (first.confidence, first.scope) == ("low", AddressClass.LOOPBACK)
            for server in servers[1:]:
                await client.connect(server.peer_id, server.addrs())
            sure = await until(changes, lambda v: v.confidence != "low")
            assert sure.addresses == client.listen_addrs()
            assert sure.mapping.kind == "none"  # all saw our own port
            assert sure.mapping.external.endswith(client.listen_addrs()[0][-5:])
            assert service.announced(()) == client.listen_addrs()
            report = service.report()
            assert report.rounds >= 2
            assert report.servers
            assert 0 <= report.age_seconds < 20


async def test_an_unreachable_peer_is_private_and_announces_circuits():
    async with mesh(2, Unreachable(HostConfig())) as (client, servers):
        for server in servers:
            await client.connect(server.peer_id, server.addrs())
        async with reachability(client) as service:
            verdict = await until(service.changes(), lambda v: v.status == "private")
            assert "could not connect" in verdict.reason
            circuit = f"{servers[0].addrs()[0]}/p2p-circuit"
            assert service.announced([circuit]) == (circuit,)


async def test_a_changed_network_is_a_reason_for_a_round():
    send, receive = trio.open_memory_channel(4)
    async with mesh(2) as (client, servers):
        for server in servers:
            await client.connect(server.peer_id, server.addrs())
        async with reachability(client, receive) as service:
            await until(service.changes(), lambda v: v.status == "public")
            before = service.report().rounds
            assert len(service.observed) == 2
            await send.send(NetworkChanged(gateway_changed=True))
            while service.report().rounds == before:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert service.verdict().status == "public"


async def test_without_servers_it_stays_unknown_and_tries_again():
    async with mesh(0) as (client, _):
        async with reachability(client) as service:
            while service.report().rounds < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert service.verdict().status == "unknown"
            assert service.verdict().reason


async def test_peers_without_autonat_are_told_in_the_report():
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(host())
        silent = await stack.enter_async_context(host())
        await client.connect(silent.peer_id, silent.addrs())
        async with reachability(client) as service:
            with trio.fail_after(10):
                while not service.report().refused:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert "E_PROTOCOL_REFUSED" in service.report().refused[0]
