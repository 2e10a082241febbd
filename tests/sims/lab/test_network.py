"""The network itself: shapes, changes while it runs, removal."""

import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from fabric.core.errors import ConfigError, FabricError
from sims.lab import namespaces
from sims.lab.enter import NAMESPACES
from sims.lab.namespaces import obstacle, run_step, sweep
from sims.lab.network import Network
from sims.lab.plan import Step
from sims.lab.topology import NatKind, Shape, Site, Topology
from sims.local import wait_until
from tests.sims.lab.conftest import ANSWER_SECONDS, SILENCE_SECONDS

needs_root = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-"),
]
PUBLIC = Site(name="public")
RATE_MBIT = 40.0
DELAY = 0.03


def received_mbit(receiver, seconds):
    """Return the rate at which ``receiver`` gets bytes, once the queues are full."""
    buffer = bytearray(1 << 18)
    settle = time.monotonic() + 0.3
    while time.monotonic() < settle:
        receiver.recv_into(buffer)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        count += receiver.recv_into(buffer)
    return count * 8 / (time.monotonic() - start) / 1e6


def receive_all(sock, seen):
    """Put datagrams into ``seen`` until the socket's timeout."""
    while True:
        seen.append(sock.recv(10)[0])


@contextmanager
def pouring(sender):
    """Send without end, from a process of its own, so that this one only counts."""
    code = (
        "import socket,sys; s=socket.socket(fileno=int(sys.argv[1]));"
        "s.setblocking(True); b=bytes(1<<18)\nwhile True: s.sendall(b)"
    )
    number = sender.fileno()
    argv = [sys.executable, "-c", code, str(number)]
    child = subprocess.Popen(argv, pass_fds=[number], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        child.kill()
        child.wait()


def round_trips(near, far, address, count=15):
    """Return UDP round-trip times, sorted."""
    found = []
    for _ in range(count):
        start = time.monotonic()
        near.sendto(b"?", address)
        data, back = far.recvfrom(10)
        far.sendto(data, back)
        near.recv(10)
        found.append(time.monotonic() - start)
    return sorted(found)


class TestShapes:
    pytestmark = needs_root

    @pytest.mark.parametrize("delay", [0.0, 0.005], ids=["kernel", "carried"])
    @pytest.mark.parametrize("upload", [True, False], ids=["up", "down"])
    def test_rate_within_a_tenth(self, lab_network, wire_of, delay, upload):
        shape = Shape(rate_mbit=RATE_MBIT, delay_seconds=delay)
        home = Site(name="home", kind=NatKind.CONE, shape=shape)
        wire = wire_of(lab_network(Topology(sites=(PUBLIC, home))))
        listener = wire.listen("public")
        near = wire.dial("home", wire.address_of(listener, "public"))
        far, _ = wire.accept(listener)
        sender, receiver = (near, far) if upload else (far, near)
        with pouring(sender):
            rate = received_mbit(receiver, 1.2)
        # tbf counts Ethernet frames: 14 + 52 of 1514 bytes are not payload
        assert rate == pytest.approx(RATE_MBIT * 1448 / 1514, rel=0.1)

    def test_delay_within_milliseconds(self, lab_network, wire_of):
        home = Site(name="home", kind=NatKind.CONE, shape=Shape(delay_seconds=DELAY))
        wire = wire_of(lab_network(Topology(sites=(PUBLIC, home))))
        far = wire.open("public", socket.SOCK_DGRAM)
        near = wire.open("home", socket.SOCK_DGRAM)
        times = round_trips(near, far, wire.address_of(far, "public"))
        assert times[0] >= 2 * DELAY
        assert times[len(times) // 2] <= 2 * DELAY + 0.006

    def test_carried_link_is_fast(self, lab_network, wire_of):
        home = Site(name="home", kind=NatKind.CONE, shape=Shape(delay_seconds=0.001))
        wire = wire_of(lab_network(Topology(sites=(PUBLIC, home))))
        listener = wire.listen("public")
        near = wire.dial("home", wire.address_of(listener, "public"))
        far, _ = wire.accept(listener)
        with pouring(near):
            assert received_mbit(far, 0.7) > 100

    def test_loss(self, lab_network, wire_of):
        lossy = Site(name="home", kind=NatKind.CONE, shape=Shape(loss=0.3))
        network = lab_network(Topology(sites=(PUBLIC, lossy), seed=7))
        wire = wire_of(network)
        far = wire.open("public", socket.SOCK_DGRAM)
        near = wire.open("home", socket.SOCK_DGRAM)
        far.settimeout(SILENCE_SECONDS)

        def arrives():
            near.sendto(b"first", wire.address_of(far, "public"))
            with suppress(TimeoutError):
                return far.recv(16) == b"first"

        # the question for the neighbour may be lost, and is asked once a second
        wait_until(arrives, ANSWER_SECONDS, "a first frame to arrive")
        for number in range(200):
            near.sendto(bytes([number]), wire.address_of(far, "public"))
        with pytest.raises(TimeoutError):
            receive_all(far, seen := [])
        assert 100 < len(seen) < 180


class TestChanges:
    pytestmark = needs_root

    @pytest.fixture
    def network(self, lab_network):
        home = Site(name="home", kind=NatKind.CONE, hosts=2)
        other = Site(name="other", kind=NatKind.SYMMETRIC)
        return lab_network(Topology(sites=(PUBLIC, home, other)))

    @pytest.fixture
    def wire(self, network, wire_of):
        return wire_of(network)

    def observed(self, wire, host):
        listener = wire.listen("public")
        near = wire.dial(host, wire.address_of(listener, "public"))
        assert isinstance(near, socket.socket), near
        far, address = wire.accept(listener)
        return near, far, address

    def test_neighbours_reach_each_other_privately(self, network, wire):
        listener = wire.listen("home-1")
        address = (network.address("home-1"), listener.getsockname()[1])
        assert isinstance(wire.dial("home-0", address), socket.socket)

    def test_other_sites_private_addresses_lead_nowhere(self, network, wire):
        listener = wire.listen("home-0")
        address = (network.address("home-0"), listener.getsockname()[1])
        dialled = wire.dial("other", address, seconds=SILENCE_SECONDS)
        assert not isinstance(dialled, socket.socket)

    @pytest.mark.parametrize("site", ["home", "public"])
    def test_renumber(self, network, wire, site):
        before = network.public_address(site)
        near, far, _ = self.observed(wire, "home-0")
        network.renumber(site)
        assert network.public_address(site) != before
        near.sendall(b"lost")
        far.settimeout(SILENCE_SECONDS)
        with pytest.raises(TimeoutError):
            far.recv(10)
        _, _, (ip, _) = self.observed(wire, "home-0")
        assert ip == network.public_address("home")

    def test_swap_gateway(self, network, wire):
        before = network.address("home-0")
        self.observed(wire, "home-0")
        network.swap_gateway("home", NatKind.SYMMETRIC)
        ports = {self.observed(wire, "home-0")[2] for _ in range(3)}
        assert {ip for ip, _ in ports} == {network.public_address("home")}
        assert network.address("home-0") == before
        assert network.topology.site("home").kind is NatKind.SYMMETRIC

    def test_swap_to_carrier_and_back(self, network, wire):
        network.swap_gateway("home", NatKind.CGNAT)
        self.observed(wire, "home-1")
        network.swap_gateway("home", NatKind.CONE)
        self.observed(wire, "home-1")

    def test_move_host(self, network, wire):
        network.move_host("home-0", "other")
        _, _, (ip, _) = self.observed(wire, "home-0")
        assert ip == network.public_address("other")
        network.move_host("home-0", "home")
        _, _, (ip, _) = self.observed(wire, "home-0")
        assert ip == network.public_address("home")

    def test_received_bytes(self, network, wire):
        near, far, _ = self.observed(wire, "home-0")
        before = network.received_bytes("public")
        near.sendall(bytes(10_000))
        received = 0
        while received < 10_000:
            received += len(far.recv(10_000))
        assert 10_000 <= network.received_bytes("public") - before < 20_000

    def test_black_hole(self, network, wire):
        near, far, _ = self.observed(wire, "home-0")
        network.black_hole("public")
        near.sendall(b"swallowed")
        far.settimeout(SILENCE_SECONDS)
        with pytest.raises(TimeoutError):
            far.recv(10)
        network.restore("public")
        self.observed(wire, "home-1")

    def test_a_gateway_replaces_a_gateway_only(self, network):
        with pytest.raises(ConfigError):
            network.swap_gateway("public", NatKind.CONE)
        with pytest.raises(ConfigError):
            network.move_host("home-0", "public")


class TestLife:
    pytestmark = needs_root

    def test_two_at_once_and_both_removed(self, lab_network, wire_of):
        topology = Topology(sites=(PUBLIC, Site(name="home", kind=NatKind.CONE)))
        with Network(topology) as one, Network(topology) as two:
            assert one.prefix != two.prefix
            wire = wire_of(one)
            listener = wire.listen("public")
            address = wire.address_of(listener, "public")
            assert isinstance(wire.dial("home", address), socket.socket)
            assert wire_of(two).dial("home", address) == "ConnectionRefusedError"
        for gone in (one, two):
            assert not list(NAMESPACES.glob(f"{gone.prefix}*"))

    def test_a_process_inside_ends_with_it(self):
        with Network(Topology(sites=(PUBLIC,))) as network:
            argv = [*network.enter("public"), "sleep", "60"]
            child = subprocess.Popen(argv)
        assert child.wait(5) != 0

    def test_removed_when_it_cannot_be_built(self, monkeypatch):
        def fail(self, site):
            raise FabricError("no")

        monkeypatch.setattr(Network, "_start_link", fail)
        network = Network(Topology(sites=(PUBLIC,)))
        with pytest.raises(FabricError, match="no"):
            network.__enter__()
        assert not list(NAMESPACES.glob(f"{network.prefix}*"))

    def test_what_a_dead_process_left_is_swept(self):
        child = subprocess.Popen(["true"])
        child.wait()
        left = f"lab.{child.pid}.1.0.switch"
        run_step(Step(("ip", "netns", "add", left)))
        with Network(Topology(sites=(PUBLIC,))) as network:
            assert not (NAMESPACES / left).exists()
            sweep()
            assert (NAMESPACES / network.namespace("public")).exists()

    def test_a_failed_command_says_what_it_said(self):
        with pytest.raises(FabricError, match="ip netns del") as caught:
            run_step(Step(("ip", "netns", "del", "lab-that-never-was")))
        assert caught.value.code == "E_LAB"


def test_without_root_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="root") as caught:
        Network(Topology(sites=(PUBLIC,))).__enter__()
    assert caught.value.code == "E_LAB"
    assert "root" in caught.value.next_step
