"""The service against a real router: miniupnpd with nftables, hosts in namespaces."""

from contextlib import asynccontextmanager

import pytest
import trio

from tests.nat.router_lab import WAN, RouterLab, built, missing

reason = missing()
pytestmark = [
    pytest.mark.root,
    pytest.mark.scenario,
    pytest.mark.skipif(bool(reason), reason=f"port mapping lab: {reason}"),
]

RENEWALS = {
    "pcp": b"PCP MAP: added mapping TCP",
    "nat-pmp": b"NAT-PMP port mapping request : 4001->",
    "upnp": b"AddPortMapping: ext port 4001",
}
methods = pytest.mark.parametrize("method", RENEWALS)


@asynccontextmanager
async def router(folder, *, wan=WAN, **speaks):
    lab = RouterLab(folder, wan=wan)
    with built(lab):
        async with trio.open_nursery() as nursery:
            try:
                await lab.start_router(nursery, **speaks)
                lab.nursery = nursery
                yield lab
            finally:
                await lab.stop_router()
                nursery.cancel_scope.cancel()


@methods
async def test_outside_reaches_a_mapped_port_which_is_renewed_and_removed(
    tmp_path, method
):
    async with router(tmp_path) as lab:
        async with lab.host(0, 4001, methods=[method], lease_seconds=8) as host:
            mapped = await host.event("mapped")
            assert mapped["method"] == method
            assert (mapped["external_ip"], mapped["external_port"]) == (WAN, 4001)
            assert (await host.event("explained", level="ok"))["code"] == "MAPPED"
            assert lab.call_from_outside(4001) == "4001"
            # asked at 0, 4, 8 and 12 s, and by PCP once to search; a lease is 8 s
            await lab.logged(RENEWALS[method], times=4 + (method == "pcp"))
            for _ in range(100):  # the router logs a request before it acts on it
                if lab.mapped_ports() == [4001]:
                    break
                await trio.sleep(0.05)
            assert lab.mapped_ports() == [4001]
            assert lab.call_from_outside(4001) == "4001"
            assert not [e for e in host.seen if e["event"] == "lost"]
        assert lab.mapped_ports() == []


@methods
async def test_a_router_that_lost_everything_is_told_again(tmp_path, method):
    async with router(tmp_path) as lab:
        # the others hear it announced
        settings = {"refresh_seconds": 5.0} if method == "upnp" else {}
        settings["methods"] = [method]
        async with lab.host(0, 4001, 4002, **settings) as host:
            await host.event("mapped")
            await host.event("mapped")
            await lab.stop_router()
            assert lab.mapped_ports() == []
            await lab.start_router(lab.nursery)
            with trio.fail_after(45):
                while lab.mapped_ports() != [4001, 4002]:
                    await lab._logged.wait()
            assert lab.call_from_outside(4002) == "4002"
        assert lab.mapped_ports() == []


@methods
async def test_two_hosts_that_want_one_port_both_get_one(tmp_path, method):
    async with router(tmp_path) as lab:
        async with (
            lab.host(0, 4001, methods=[method]) as first,
            lab.host(1, 4001, methods=[method]) as second,
        ):
            ports = {
                (await first.event("mapped"))["external_port"],
                (await second.event("mapped"))["external_port"],
            }
            assert len(ports) == 2
            assert 4001 in ports
            assert sorted(ports) == lab.mapped_ports()
            for port in ports:
                assert lab.call_from_outside(port) == "4001"
        assert lab.mapped_ports() == []


async def test_all_at_once_prefers_pcp_and_leaves_nothing_of_the_others(tmp_path):
    async with router(tmp_path) as lab:
        async with lab.host(0, 4001) as host:
            assert (await host.event("mapped"))["method"] == "pcp"
        assert lab.mapped_ports() == []


async def test_upnp_alone_is_found_when_the_rest_is_closed(tmp_path):
    async with router(tmp_path, pmp=False) as lab:
        async with lab.host(0, 4001) as host:
            assert (await host.event("mapped"))["method"] == "upnp"


async def test_a_router_that_speaks_nothing_is_reported(tmp_path):
    async with router(tmp_path) as lab:
        await lab.stop_router()
        async with lab.host(0, 4001) as host:
            finding = await host.event("explained", level="warn")
            assert finding["code"] == "E_MAP_REFUSED"
            assert "port 5351 is closed" in finding["reason"]
            assert "forward TCP port 4001 to 192.168.77.10" in finding["next_step"]
            await lab.start_router(lab.nursery)
            await host.change_network()
            await host.event("mapped")


async def test_a_private_outer_address_is_said_to_be_no_use(tmp_path):
    async with router(tmp_path, wan="10.9.9.1") as lab:
        async with lab.host(0, 4001) as host:
            finding = await host.event("explained", level="warn")
            assert finding["code"] in ("E_MAP_NOT_PUBLIC", "E_MAP_REFUSED")


async def test_a_gateway_that_went_away_loses_the_mapping_and_returns(tmp_path):
    async with router(tmp_path) as lab:
        async with lab.host(0, 4001) as host:
            await host.event("mapped")
            lab.inside("h0", "ip", "route", "del", "default")
            await host.change_network()
            assert (await host.event("lost"))["reason"] == "the network changed"
            await host.event("explained", code="E_MAP_NO_GATEWAY")
            lab.inside("h0", "ip", "route", "add", "default", "via", "192.168.77.1")
            await host.change_network()
            await host.event("mapped")


async def test_leaving_a_dead_router_is_bounded(tmp_path):
    async with router(tmp_path) as lab:
        async with lab.host(0, 4001, methods=["pcp"], close_seconds=1.0) as host:
            await host.event("mapped")
            lab.inside("g", "ip", "link", "set", "lan0", "down")
            assert await host.leave() < 4
            lab.inside("g", "ip", "link", "set", "lan0", "up")
