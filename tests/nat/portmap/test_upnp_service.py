import os

import pytest
import trio

from nat.portmap.upnp_messages import (
    UpnpConflict,
    UpnpFailed,
    UpnpFound,
    UpnpMap,
    UpnpMapped,
    UpnpSearch,
    UpnpUnmap,
    UpnpUnmapped,
)
from nat.portmap.upnp_service import call_upnp
from tests.nat.portmap.igd import open_igd

pytestmark = pytest.mark.slow

# an address of this machine that no other test uses
_PID = os.getpid()
ADDRESS = f"127.{_PID >> 14 & 0xFF}.{_PID >> 7 & 0x7F}.{_PID & 0x7F | 0x80}"
CLIENT = "127.0.0.1"
SECONDS = 30.0
"""Patience where the answer is what is tested; a loaded machine is slow."""


@pytest.fixture
async def igd():
    async with open_igd(ADDRESS) as device:
        yield device


def wanted(igd, kind=UpnpMap, external_port=4001, **more):
    return kind(
        gateway=ADDRESS,
        source=CLIENT,
        url=igd.url,
        internal_port=4001,
        external_port=external_port,
        **more,
    )


async def map_port(igd, external_port=4001):
    request = wanted(igd, external_port=external_port, lease_seconds=60)
    return await call_upnp(request, SECONDS)


async def search(seconds=SECONDS):
    return await call_upnp(UpnpSearch(gateway=ADDRESS, source=CLIENT), seconds)


async def test_search_map_renew_and_unmap(igd):
    assert await search() == UpnpFound(url=igd.url, external_ip="198.51.100.1")
    for _ in range(2):
        assert await map_port(igd) == UpnpMapped(
            internal_port=4001,
            external_port=4001,
            external_ip="198.51.100.1",
            lease_seconds=60,
        )
    assert list(igd.table) == [4001]
    gone = await call_upnp(wanted(igd, UpnpUnmap), SECONDS)
    assert gone == UpnpUnmapped(internal_port=4001)
    assert igd.table == {}


@pytest.mark.parametrize("no_lookup", [False, True])
async def test_another_hosts_port_is_a_conflict_and_stays_its(igd, no_lookup):
    igd.no_lookup = no_lookup
    igd.table[4001] = theirs = ("192.168.1.99", 4001, 0)
    conflict = UpnpConflict(internal_port=4001, external_port=4001)
    assert await map_port(igd) == conflict
    if not no_lookup:
        await call_upnp(wanted(igd, UpnpUnmap), SECONDS)
    assert igd.table == {4001: theirs}


async def test_a_mapping_that_the_router_cannot_look_up_is_removed(igd):
    igd.no_lookup = True
    assert isinstance(await map_port(igd), UpnpMapped)
    await call_upnp(wanted(igd, UpnpUnmap), SECONDS)
    assert igd.table == {}


async def test_permanent_mappings_where_the_router_knows_no_others(igd):
    igd.permanent_only = True
    answer = await map_port(igd)
    assert isinstance(answer, UpnpMapped)
    assert answer.lease_seconds == 0


async def test_a_device_that_moved_is_found_again(igd):
    good, igd.url = igd.url, igd.url.replace("/desc.xml", ":1/desc.xml")
    igd.location, igd.url = good, f"http://{ADDRESS}:1/desc.xml"
    assert isinstance(await map_port(igd), UpnpMapped)


async def test_nobody_answers():
    answer = await search()
    assert answer == UpnpFailed(reason="no answer to the search")


@pytest.mark.parametrize("location", ["http://127.0.0.1:9/x", "x" * 1990])
async def test_a_description_elsewhere_is_not_fetched(igd, location):
    igd.location = location
    assert await search() == UpnpFailed(reason="no answer to the search")
    assert igd.requests == 0


async def test_control_elsewhere_is_refused(igd):
    igd.control = "http://192.0.2.7/control"
    answer = await map_port(igd)
    assert isinstance(answer, UpnpFailed)
    assert answer.reason == f"the device's URL is not at {ADDRESS}"
    assert igd.table == {}


@pytest.mark.parametrize("hostile", ["endless", "drip"])
async def test_a_router_that_never_ends_is_left(igd, hostile):
    igd.hostile = hostile
    before = trio.current_time()
    answer = await search(seconds=6.0)
    assert isinstance(answer, UpnpFailed)
    assert trio.current_time() - before < 12
    assert not any(_workers())


@pytest.mark.parametrize("address", ["x" * 40, "1.2.3.4<", ""])
async def test_any_external_address_is_only_text(igd, address):
    igd.external_ip = address
    answer = await map_port(igd)
    assert isinstance(answer, UpnpMapped | UpnpFailed)


async def test_cancellation_ends_the_process(igd):
    igd.hostile = "drip"
    with trio.move_on_after(SECONDS) as scope:
        async with trio.open_nursery() as nursery:

            async def cancel_once_asked():
                while not igd.requests:
                    await trio.lowlevel.checkpoint()
                assert any(_workers())
                nursery.cancel_scope.cancel()

            nursery.start_soon(cancel_once_asked)
            await search()
    assert not scope.cancelled_caught
    assert not any(_workers())


def _workers():
    """Yield the UPnP processes that this process started."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
            with open(f"/proc/{name}/cmdline") as file:
                command = file.read()
        except OSError:
            continue
        if int(parent) == os.getpid() and "upnp_worker" in command and state != "Z":
            yield name
