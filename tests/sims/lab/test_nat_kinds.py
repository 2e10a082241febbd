"""Each kind of NAT as plain sockets see it: mapping, filtering, what is blocked."""

import itertools
import socket

import pytest

from sims.lab.namespaces import obstacle
from sims.lab.network import Network
from sims.lab.topology import Filtering, Mapping, NatKind, Site, Topology
from tests.sims.lab.conftest import SILENCE_SECONDS

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-"),
]

PUBLIC = ("alice", "bob")
"""Two observers on the public network."""
NATED = [kind for kind in NatKind if kind is not NatKind.NONE]
OPEN = [kind for kind in NATED if not kind.behaviour.only_port]
TALKS_UDP = [kind for kind in NATED if kind.behaviour.udp]


@pytest.fixture(scope="module")
def network():
    sites = [Site(name=name) for name in PUBLIC]
    sites += [Site(name=kind.value, kind=kind) for kind in NATED]
    with Network(Topology(sites=tuple(sites))) as network:
        yield network


@pytest.fixture
def wire(network, wire_of):
    return wire_of(network)


def observed_tcp(wire, host, port, count=1):
    """Dial each observer ``count`` times from one private port; return the answers."""
    seen = []
    for _ in range(count):
        for name in PUBLIC:
            listener = wire.listen(name)
            dialled = wire.dial(host, wire.address_of(listener, name), port=port)
            assert isinstance(dialled, socket.socket), dialled
            seen.append(wire.accept(listener)[1])
    return seen


def check_mapping(mapping, private, ports):
    if mapping is Mapping.INDEPENDENT:
        assert set(ports) == {private}
    elif mapping is Mapping.REMAPPED:
        assert len(set(ports)) == 1
        assert private not in ports
    elif mapping is Mapping.RANDOM:
        assert len(set(ports)) == len(ports)
    elif mapping is Mapping.SEQUENTIAL:
        assert all(b - a == 1 for a, b in itertools.pairwise(ports))


class TestMapping:
    @pytest.mark.parametrize("kind", OPEN)
    def test_tcp(self, network, wire, kind):
        private = 31_000 + NATED.index(kind)
        seen = observed_tcp(wire, kind.value, private, count=2)
        assert {ip for ip, _ in seen} == {network.public_address(kind.value)}
        check_mapping(kind.behaviour.mapping, private, [port for _, port in seen])

    @pytest.mark.parametrize("kind", TALKS_UDP)
    def test_udp(self, network, wire, kind):
        sock = wire.open(kind.value, socket.SOCK_DGRAM)
        ports = []
        for name in PUBLIC:
            observer = wire.open(name, socket.SOCK_DGRAM)
            sock.sendto(b"?", wire.address_of(observer, name))
            _, (ip, port) = observer.recvfrom(100)
            assert ip == network.public_address(kind.value)
            observer.sendto(b"!", (ip, port))
            assert sock.recv(100) == b"!"
            ports.append(port)
        check_mapping(kind.behaviour.mapping, sock.getsockname()[1], ports)


class TestFiltering:
    @pytest.mark.parametrize("kind", OPEN)
    def test_tcp(self, network, wire, kind):
        """A host that dialled alice is dialled by alice's other ports, then by bob."""
        private = 32_000 + NATED.index(kind)
        listener = wire.listen(kind.value, private)
        alice = wire.listen("alice")
        assert wire.dial(kind.value, wire.address_of(alice, "alice"), port=private)
        _, mapped = wire.accept(alice)
        refusal = "ConnectionRefusedError" if kind.behaviour.resets else "TimeoutError"
        filtering = kind.behaviour.filtering
        for name, admits in (
            ("alice", filtering in (Filtering.ADDRESS, Filtering.INDEPENDENT)),
            ("bob", filtering is Filtering.INDEPENDENT),
        ):
            dialled = wire.dial(name, mapped, seconds=SILENCE_SECONDS)
            if admits:
                assert isinstance(dialled, socket.socket), dialled
                inside, _ = wire.accept(listener)
                dialled.sendall(b"in")
                assert inside.recv(10) == b"in"
            else:
                assert dialled == refusal

    @pytest.mark.parametrize("kind", NATED)
    def test_nobody_gets_in_where_no_mapping_is(self, network, wire, kind):
        wire.listen(kind.value, 33_000)
        address = (network.public_address(kind.value), 33_000)
        refusal = "ConnectionRefusedError" if kind.behaviour.resets else "TimeoutError"
        assert wire.dial("alice", address, seconds=SILENCE_SECONDS) == refusal

    def test_simultaneous_open_crosses_two_cones(self, network, wire):
        """What hole punching stands on: both SYNs leave, both NATs let them in."""
        one, other = wire.open("cone", port=34_001), wire.open("cgnat", port=34_002)
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.connect((network.public_address("cgnat"), 34_002))
        other.connect((network.public_address("cone"), 34_001))
        other.sendall(b"hello")
        one.settimeout(5)
        assert one.recv(10) == b"hello"


class TestBlocked:
    def test_udp_blocked_lets_tcp_out_and_no_datagram(self, wire):
        observer = wire.open("alice", socket.SOCK_DGRAM)
        sock = wire.open("udp_blocked", socket.SOCK_DGRAM)
        sock.sendto(b"?", wire.address_of(observer, "alice"))
        observer.settimeout(SILENCE_SECONDS)
        with pytest.raises(TimeoutError):
            observer.recv(10)

    def test_only_443(self, network, wire):
        web = wire.listen("alice", 443)
        other = wire.listen("alice")
        reached = wire.dial("only_443", wire.address_of(web, "alice"))
        assert isinstance(reached, socket.socket)
        blocked = wire.address_of(other, "alice")
        assert wire.dial("only_443", blocked, seconds=SILENCE_SECONDS) == "TimeoutError"
