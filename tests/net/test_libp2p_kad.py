from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig, RoutingConfig
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_kad import open_routing
from fabric.net.protocols import KAD_PROTOCOL
from tests.net.check_host import ListGate

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
FAST = RoutingConfig(store_interval_seconds=0.05, query_seconds=2)
KEY = bytes(range(32))
pytestmark = pytest.mark.slow


@asynccontextmanager
async def line(count):
    """Yield ``count`` (host, routing) pairs, each connected with the next."""
    async with AsyncExitStack() as stack:
        pairs = []
        for _ in range(count):
            host = await stack.enter_async_context(
                open_host(LOOPBACK, Ed25519Signer.generate(), ListGate(), Counters())
            )
            routing = await stack.enter_async_context(open_routing(host, FAST))
            if pairs:
                await host.connect(pairs[-1][0].peer_id, pairs[-1][0].addrs())
            pairs.append((host, routing))
        with trio.fail_after(20):
            yield pairs


async def test_providers_are_found_afresh_and_once():
    async with line(3) as pairs:
        hosts, routings = zip(*pairs, strict=True)
        first, middle, last = routings
        assert await last.find_providers(KEY, 10) == ()
        assert await first.provide(KEY) >= 1
        assert await last.find_providers(KEY, 10) == (hosts[0].peer_id,)
        # a second provider appears to a reader that asked before
        assert await middle.provide(KEY) >= 1
        assert set(await last.find_providers(KEY, 10)) == {
            hosts[0].peer_id,
            hosts[1].peer_id,
        }
        assert len(await last.find_providers(KEY, 1)) == 1
        # nobody is told of itself, and the provider sees the other
        assert await first.find_providers(KEY, 10) == (hosts[1].peer_id,)


async def test_nobody_to_ask_is_no_error_and_keys_are_checked():
    async with line(1) as ((_, routing),):
        assert await routing.provide(KEY) == 0
        assert await routing.find_providers(KEY, 5) == ()
        with pytest.raises(ValueError, match="31"):
            await routing.provide(KEY[1:])


async def test_a_peer_that_is_not_admitted_stores_nothing():
    async with line(2) as ((one, mine), (two, theirs)):
        two.gate.refused.add((one.peer_id, KAD_PROTOCOL))
        assert await mine.provide(KEY) == 0
        assert await theirs.find_providers(KEY, 5) == ()
        two.gate.refused.clear()
        assert await mine.provide(KEY) == 1


async def test_many_keys_are_all_stored_because_they_are_paced():
    """Peers refuse more than ten records in ten seconds; a refusal is not counted."""
    keys = [bytes([n]) * 32 for n in range(12)]
    async with line(2) as ((one, mine), (_, theirs)):
        counts = [await mine.provide(key) for key in keys]
        for key, count in zip(keys, counts, strict=True):
            found = await theirs.find_providers(key, 5)
            assert (one.peer_id in found) == (count == 1)
        assert counts[:10] == [1] * 10
        assert counts[10:] == [0, 0]


async def test_a_peer_that_left_is_forgotten():
    async with line(3) as pairs:
        (_, first), (middle, _), (last, _) = pairs
        assert await first.provide(KEY) == 2  # it dialed the far one, too
        await last.disconnect(middle.peer_id)
        await last.disconnect(pairs[0][0].peer_id)
        assert await first.provide(KEY) >= 1
