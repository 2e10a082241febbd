"""No relay is left: a member that is connected with both carries the circuit."""

from contextlib import asynccontextmanager

import pytest
import trio

from fabric.core.errors import NoRoute
from nat.relay.circuit_addresses import via
from tests.nat.relay.relay_network import SECONDS, client, data_circuit, relay

pytestmark = pytest.mark.slow
QUICK = {"via_after_seconds": 0.0}


@asynccontextmanager
async def chain(volunteer="auto"):
    """Yield a member that nobody reserved with, between two that know it alone."""
    async with (
        relay(volunteer=volunteer) as hub,
        client(**QUICK) as one,
        client(**QUICK) as two,
    ):
        for end in (one, two):
            await end.host.connect(hub.id, hub.host.addrs())
            end.neighbours = (hub.id,)
        with trio.fail_after(SECONDS):
            yield hub, one, two


async def test_a_member_that_is_not_public_carries_data():
    async with chain() as (hub, one, two):
        assert not hub.relay.active
        near, far = await data_circuit(one, two)
        await near.send_all(b"label")
        assert await far.receive_some(5) == b"label"
        await near.aclose()
        await far.aclose()


async def test_and_control_connections():
    async with chain() as (hub, one, two):
        await one.host.connect(two.id, [via(hub.id, two.id)])
        (info,) = one.host.connections(two.id)
        assert (info.kind, info.relay) == ("relay", hub.id)


async def test_it_carries_nothing_for_strangers_nor_to_them():
    for stranger in ("one", "two"):
        async with chain() as (hub, one, two):
            hub.gate.strangers.add({"one": one, "two": two}[stranger].id)
            with pytest.raises(NoRoute):
                await one.circuits.open_data(two.id)
            assert not hub.relay.book.circuits


async def test_nor_when_its_operator_does_not_want_it_to():
    async with chain("never") as (_, one, two):
        with pytest.raises(NoRoute):
            await one.circuits.open_data(two.id)


async def test_who_is_not_connected_with_both_says_so():
    async with chain() as (hub, one, two):
        await two.host.disconnect(hub.id)
        with pytest.raises(NoRoute, match="CONNECTION_FAILED"):
            await one.circuits.open_data(two.id)
