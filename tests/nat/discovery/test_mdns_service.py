"""Members on one network hear each other; a network without multicast hurts nobody."""

import asyncio
import os
import subprocess
import sys
import threading
import uuid
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing
import zeroconf

from fabric.core.errors import Unavailable
from fabric.core.ids import MeshId, peer_id_of
from nat.discovery.config import DiscoveryConfig
from nat.discovery.mdns import SERVICE, tag_of
from nat.discovery.mdns_service import MdnsService
from nat.discovery.mdns_zeroconf import E_MDNS, Inbox, ZeroconfLink

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
SECONDS = 15
ON_LOOPBACK = DiscoveryConfig(mdns_interfaces=("127.0.0.1",), mdns_poll_seconds=1)


class Neighbour:
    def __init__(self, number, mesh, config=ON_LOOPBACK, ip="127.0.0.1"):
        self.peer = peer_id_of(bytes([number]) * 32)
        self.addrs = [f"/ip4/{ip}/tcp/{4800 + number}/p2p/{self.peer}"]
        self.heard = {}
        self.service = MdnsService(
            self.peer, mesh, config, lambda: self.addrs, self.heard.update
        )

    @property
    def state(self):
        return self.service.report().state


@asynccontextmanager
async def running(*neighbours):
    async with trio.open_nursery() as nursery:
        for neighbour in neighbours:
            with trio.fail_after(0.5):  # starting waits for nothing
                await nursery.start(neighbour.service.run)
        yield
        nursery.cancel_scope.cancel()


async def until(done):
    with trio.fail_after(SECONDS):
        while not done():
            await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.fixture
def mesh():
    """A mesh of this test alone: other tests use the same loopback."""
    return MeshId(uuid.uuid4().hex * 2)


async def test_members_hear_each_other_and_no_other_mesh(mesh):
    one, two = Neighbour(1, mesh), Neighbour(2, mesh)
    other = Neighbour(3, MeshId(uuid.uuid4().hex * 2))
    async with running(one, two, other):
        await until(lambda: one.heard and two.heard)
        assert one.heard == {two.peer: tuple(two.addrs)}
        assert two.heard == {one.peer: tuple(one.addrs)}
        assert other.heard == {}
        await until(lambda: other.state == "announcing")
        assert one.service.report().heard == 1
    assert not [t for t in threading.enumerate() if "zeroconf" in t.name.lower()]


async def test_a_changed_address_is_announced(mesh):
    one, two = Neighbour(1, mesh), Neighbour(2, mesh)
    async with running(one, two):
        await until(lambda: two.heard)
        # the neighbour believes one change in five seconds
        two.service._neighbours._seen.clear()
        one.addrs[:] = [f"/ip4/127.0.0.1/tcp/9999/p2p/{one.peer}"]
        one.service.network_changed()
        await until(lambda: two.heard[one.peer] == tuple(one.addrs))


async def test_off_and_nothing_to_announce(mesh):
    off = Neighbour(1, mesh, DiscoveryConfig(mdns=False))
    idle = Neighbour(2, mesh, DiscoveryConfig())  # listens on loopback only
    async with running(off, idle):
        await until(lambda: idle.state == "idle")
        assert off.state == "off"
        assert "local network" in idle.service.report().reason


async def test_an_interface_that_is_not_there_is_a_finding(mesh):
    config = DiscoveryConfig(mdns_interfaces=("203.0.113.77",))
    broken = Neighbour(1, mesh, config, ip="203.0.113.77")
    async with running(broken):
        await until(lambda: broken.state == "failed")
        assert "multicast" in broken.service.report().reason
        assert "5353" in broken.service.report().next_step


async def test_a_flood_of_names_is_cut_and_a_member_still_heard(mesh):
    one, two = Neighbour(1, mesh), Neighbour(2, mesh)
    flood = zeroconf.Zeroconf(
        interfaces=["127.0.0.1"],
        ip_version=zeroconf.IPVersion.V4Only,
        use_asyncio=False,
    )
    tag = b"fabric=" + tag_of(mesh).encode()
    try:
        async with running(one):
            await until(lambda: one.state == "announcing")
            for i in range(40):
                peer = peer_id_of(bytes([100 + i]) * 32)
                text = [tag, f"dnsaddr=/ip4/127.0.0.1/tcp/1/p2p/{peer}".encode()]
                if i % 4 == 0:
                    text = [tag, b"dnsaddr=/garbage"]
                info = zeroconf.ServiceInfo(
                    SERVICE,
                    f"flood{i}.{SERVICE}",
                    port=1,
                    properties=b"".join(bytes([len(s)]) + s for s in text),
                    server=f"flood{i}.local.",
                )
                register = flood.async_register_service(
                    info, cooperating_responders=True
                )
                asyncio.run_coroutine_threadsafe(register, flood.loop)
            await until(lambda: one.service.report().dropped >= 10)
            async with running(two):
                await until(lambda: two.peer in one.heard)
            assert len(one.heard) <= 32
    finally:
        flood.close()


def test_the_library_reports_in_our_words():
    link = ZeroconfLink(Inbox(lambda: None))
    assert link.lookup("nobody") == b""
    with pytest.raises(Unavailable) as error:
        link.open("name", b"", [], ["203.0.113.77"])
    assert error.value.code == E_MDNS
    link.close()
    link.close()


def run(*words):
    subprocess.run(words, check=True, capture_output=True, timeout=10)


@pytest.fixture
def lan():
    """Three namespaces: two hosts on a bridge, and one without any network."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    names = [f"md{os.getpid()}{letter}" for letter in "abcx"]
    bridge = names[3]
    with ExitStack() as stack:
        try:
            for name in names:
                run("ip", "netns", "add", name)
                stack.callback(run, "ip", "netns", "del", name)
        except (OSError, subprocess.CalledProcessError) as exc:
            pytest.skip(f"no namespaces here: {exc}")
        inside = partial(run, "ip", "-n")
        inside(bridge, "link", "add", "br0", "type", "bridge")
        inside(bridge, "link", "set", "br0", "up")
        for number, name in enumerate(names[:2], 1):
            port = f"p{number}"
            inside(
                *(bridge, "link", "add", port, "type", "veth"),
                *("peer", "name", "eth0", "netns", name),
            )
            inside(bridge, "link", "set", port, "master", "br0", "up")
            inside(name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            inside(name, "link", "set", "eth0", "up")
        yield names[:3]


@asynccontextmanager
async def peer_in(namespace, *words):
    command = ["ip", "netns", "exec", namespace, sys.executable, "-P"]
    command += ["-m", "tests.nat.discovery.mdns_peer", *words]
    process = await trio.lowlevel.open_process(
        [*command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()
            await process.stdin.aclose()


async def line(process):
    text = b""
    while not text.endswith(b"\n"):
        more = await process.stdout.receive_some(1)
        assert more, "the peer ended"
        text += more
    return text.decode().strip()


@pytest.mark.root
async def test_two_machines_on_one_lan_hear_each_other(lan, mesh):
    one, two, _ = lan
    async with (
        peer_in(one, "1", mesh, "10.77.0.1") as first,
        peer_in(two, "2", mesh, "10.77.0.2") as second,
    ):
        with trio.fail_after(SECONDS):
            assert (await line(first)).startswith("/ip4/10.77.0.2/tcp/4801/p2p/")
            assert (await line(second)).startswith("/ip4/10.77.0.1/tcp/4801/p2p/")


@pytest.mark.root
async def test_a_machine_without_network_starts_and_says_so(lan, mesh):
    async with peer_in(lan[2], "1", mesh, "10.77.0.9") as alone:
        with trio.fail_after(SECONDS):
            # the report is asked for when its input ends
            await trio.lowlevel.checkpoint()
            await alone.stdin.aclose()
            assert await line(alone) in ("starting", "failed")
            assert await alone.wait() == 0
