"""The relay's book: any order of requests keeps every limit."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nat.relay.config import RelayConfig
from nat.relay.core import MAX_ACCOUNTS, Circuit, Refusal, RelayBook
from nat.relay.messages import UNLIMITED, Limit, Status
from nat.relay.rates import MAX_REQUESTERS, RequestRates

IP = "192.0.2.1"


def reserved(book, peer, now=0.0, *, member=True, ip=""):
    return book.reserve(peer, ip or peer, member=member, now=now)


def test_a_reservation_is_renewed_and_expires():
    book = RelayBook(RelayConfig(reservation_seconds=100, max_reservations=1))
    assert reserved(book, "A") == 100
    assert reserved(book, "A", 90) == 100
    assert isinstance(book.connect("B", "A", members=True, now=189), Circuit)
    late = book.connect("B", "A", members=True, now=190)
    assert late.status is Status.NO_RESERVATION
    assert reserved(book, "C", 190) == 100  # its place is free again


def test_a_peer_that_disconnects_is_reserved_no_more():
    book = RelayBook(RelayConfig())
    reserved(book, "A")
    book.forget("A")
    book.forget("A")
    assert book.connect("B", "A", members=True, now=1).status is Status.NO_RESERVATION


def test_reservations_are_limited_in_all_per_ip_and_for_strangers():
    book = RelayBook(
        RelayConfig(
            max_reservations=3, max_reservations_per_ip=2, stranger_max_reservations=1
        )
    )
    assert reserved(book, "A", ip=IP)
    assert reserved(book, "B", ip=IP)
    flood = reserved(book, "C", ip=IP)
    assert (flood.status, flood.reason) == (
        Status.RESERVATION_REFUSED,
        "reservations_per_ip",
    )
    assert reserved(book, "S", member=False) == 3600
    assert reserved(book, "T", member=False).reason == "stranger_reservations"
    assert reserved(book, "C") == 3600  # strangers do not use up the members' places
    assert reserved(book, "D").reason == "reservations"
    assert reserved(book, "A", ip=IP) == 3600  # renewals go on
    assert book.refused == {
        "reservations_per_ip": 1,
        "stranger_reservations": 1,
        "reservations": 1,
    }


def test_circuits_are_limited_in_all_per_peer_and_for_strangers():
    book = RelayBook(
        RelayConfig(max_circuits=3, max_circuits_per_peer=2, stranger_max_circuits=1)
    )
    for peer in "ABC":
        reserved(book, peer)
    first = book.connect("X", "A", members=True, now=0)
    assert book.connect("Y", "A", members=True, now=0).limit is UNLIMITED
    refused = book.connect("Z", "A", members=True, now=0)
    assert (refused.status, refused.reason) == (
        Status.RESOURCE_LIMIT_EXCEEDED,
        "circuits_per_peer",
    )
    assert isinstance(book.connect("Z", "B", members=True, now=0), Circuit)
    assert book.connect("Z", "C", members=True, now=0).reason == "circuits"
    stranger = book.connect("S", "C", members=False, now=0)
    assert stranger.limit == Limit(duration_seconds=120, data_bytes=2 << 20)
    assert stranger.ends_at == 120
    assert book.connect("T", "C", members=False, now=0).reason == "stranger_circuits"
    book.release(first)
    book.release(first)
    assert isinstance(book.connect("Z", "C", members=True, now=0), Circuit)


def test_a_stranger_that_is_admitted_keeps_its_circuit_if_there_is_room():
    book = RelayBook(RelayConfig(max_circuits=1, circuit_seconds=500))
    reserved(book, "A")
    stranger = book.connect("S", "A", members=False, now=0)
    member = book.connect("B", "A", members=True, now=0)
    book.promote(stranger, 100)
    assert stranger.stranger  # no room among the members
    book.release(member)
    book.promote(stranger, 100)
    assert not stranger.stranger
    assert stranger.ends_at == 600
    assert isinstance(book.take(stranger, 0, 3 << 20, 100), float)
    assert book.connect("B", "A", members=True, now=100).reason == "circuits"
    book.promote(stranger, 200)
    assert stranger.ends_at == 600


def test_who_asks_for_circuits_is_limited_as_who_is_asked_for():
    book = RelayBook(RelayConfig(max_circuits_per_peer=2))
    for peer in "ABC":
        reserved(book, peer)
    for target in "AB":
        assert isinstance(book.connect("X", target, members=True, now=0), Circuit)
    assert book.connect("X", "C", members=True, now=0).reason == "circuits_per_peer"


@pytest.mark.parametrize("ends", [("BA", "BC"), ("BA", "CA")])
def test_a_peers_rate_is_that_of_all_its_circuits(ends):
    book = RelayBook(RelayConfig(max_bytes_per_second_per_peer=1e6))
    reserved(book, "A")
    reserved(book, "C")
    circuits = [book.connect(*pair, members=True, now=0) for pair in ends]
    assert sum(greedy(book, circuits, 10).values()) / 10 == pytest.approx(1e6, rel=0.05)


def test_who_has_asked_a_lot_is_not_forgotten():
    rates = RequestRates(0.001, 2)
    assert rates.allows("greedy", 0)
    assert rates.allows("greedy", 0)
    for i in range(2 * MAX_REQUESTERS):
        rates.allows(f"{i}", 0)
    assert not rates.allows("greedy", 1)


def test_nobody_connects_with_itself():
    book = RelayBook(RelayConfig())
    reserved(book, "A")
    refused = book.connect("A", "A", members=True, now=0)
    assert refused.status is Status.PERMISSION_DENIED


def test_the_data_limit_holds_in_each_direction_to_the_byte():
    book = RelayBook(RelayConfig(circuit_bytes=1000))
    reserved(book, "A")
    circuit = book.connect("B", "A", members=True, now=0)
    for direction in (0, 1):
        assert book.take(circuit, direction, 1000, 0) == 0
        refused = book.take(circuit, direction, 1, 0)
        assert refused.reason == "circuit_bytes"
    assert circuit.carried == [1000, 1000]
    assert book.carried == {"A": 2000, "B": 2000}


def greedy(book, circuits, seconds, piece=16384):
    """Let every circuit send all it may; return the bytes of each."""
    due = dict.fromkeys(circuits, 0.0)
    while True:
        circuit = min(due, key=due.__getitem__)
        now = due[circuit]
        if now >= seconds:
            return {each: sum(each.carried) for each in circuits}
        due[circuit] = now + book.take(circuit, 0, piece, now)


RATES = [
    ({"max_bytes_per_second_per_circuit": 1e6}, 1e6, 2e6),
    ({"max_bytes_per_second_per_peer": 1e6}, None, 1e6),
    ({"max_bytes_per_second": 1e6}, None, 1e6),
]


@pytest.mark.parametrize(("settings", "each", "both"), RATES)
def test_byte_rates_are_kept_within_five_percent(settings, each, both):
    book = RelayBook(RelayConfig(**settings))
    reserved(book, "A")
    circuits = [book.connect("B", "A", members=True, now=0) for _ in range(2)]
    carried = greedy(book, circuits, 10)
    assert sum(carried.values()) / 10 == pytest.approx(both, rel=0.05)
    fair = each or both / 2
    assert all(n / 10 == pytest.approx(fair, rel=0.05) for n in carried.values())


def test_strangers_share_their_small_rate_and_leave_the_rest():
    config = RelayConfig(
        stranger_bytes_per_second=1e5,
        stranger_circuit_bytes=1 << 30,
        max_bytes_per_second=1e6,
    )
    book = RelayBook(config)
    reserved(book, "A")
    strangers = [book.connect(f"S{i}", "A", members=False, now=0) for i in range(4)]
    member = book.connect("B", "A", members=True, now=0)
    carried = greedy(book, [*strangers, member], 10)
    assert sum(carried[each] for each in strangers) / 10 == pytest.approx(1e5, rel=0.1)
    assert carried[member] / 10 == pytest.approx(9e5, rel=0.05)


def test_requests_are_limited_per_peer_and_per_ip():
    book = RelayBook(RelayConfig(request_burst=4, requests_per_second=1))
    assert [book.request("A", IP, 0) for _ in range(4)] == [None] * 4
    assert book.request("A", IP, 0).reason == "requests_per_second"
    assert book.request("A", IP, 1) is None
    flood = [book.request(f"P{i}", IP, 1) for i in range(100)]
    assert flood.count(None) <= 16
    assert book.request("Q", "192.0.2.2", 1) is None


def test_tables_stay_bounded():
    rates = RequestRates(1, 1)
    assert rates.allows("first", 0)
    for i in range(2 * MAX_REQUESTERS):
        rates.allows(f"{i}", i / 1000)
    assert len(rates._buckets) <= MAX_REQUESTERS
    book = RelayBook(RelayConfig(max_circuits_per_peer=10**6, max_circuits=10**6))
    reserved(book, "A")
    for i in range(MAX_ACCOUNTS + 10):
        circuit = book.connect(f"{i}", "A", members=True, now=0)
        book.take(circuit, 0, 1, 0)
        book.release(circuit)
    assert len(book.carried) == MAX_ACCOUNTS
    assert "A" in book.carried  # the largest account stays
    assert not book._budget._peers
    assert not book._budget._circuits


CONFIG = RelayConfig(
    reservation_seconds=10,
    max_reservations=3,
    max_reservations_per_ip=2,
    stranger_max_reservations=2,
    max_circuits=4,
    max_circuits_per_peer=3,
    stranger_max_circuits=2,
    stranger_circuit_bytes=5000,
)
PEERS = st.sampled_from("ABCDEFG")


class AnyOrder(RuleBasedStateMachine):
    """Requests in any order against a plain model of who holds what."""

    def __init__(self):
        super().__init__()
        self.book = RelayBook(CONFIG)
        self.now = 0.0
        self.until = {}
        self.ips = {}
        self.members = {}

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds):
        self.now += seconds

    @rule(peer=PEERS, ip=st.sampled_from("12"), member=st.booleans())
    def reserve(self, peer, ip, member):
        answer = self.book.reserve(peer, ip, member=member, now=self.now)
        if isinstance(answer, Refusal):
            assert answer.status is Status.RESERVATION_REFUSED
            return
        self.until[peer] = self.now + answer
        self.ips[peer] = ip
        self.members[peer] = member

    @rule(peer=PEERS)
    def disconnect(self, peer):
        self.book.forget(peer)
        self.until.pop(peer, None)

    @rule(ends=st.tuples(PEERS, PEERS), members=st.booleans())
    def connect(self, ends, members):
        source, target = ends
        answer = self.book.connect(source, target, members=members, now=self.now)
        held = self.until.get(target, 0) > self.now
        if not held:
            assert answer.status is Status.NO_RESERVATION
        if isinstance(answer, Circuit):
            assert held
            assert answer.stranger != members

    @rule(data=st.data(), size=st.integers(1, 4000), direction=st.sampled_from([0, 1]))
    def carry(self, data, size, direction):
        if not self.book.circuits:
            return
        some = sorted(self.book.circuits, key=lambda c: (c.source, c.target))
        circuit = data.draw(st.sampled_from(some))
        answer = self.book.take(circuit, direction, size, self.now)
        if isinstance(answer, Refusal):
            assert circuit.stranger
            self.book.release(circuit)
        else:
            assert answer >= 0

    @rule(data=st.data())
    def close(self, data):
        if self.book.circuits:
            some = sorted(self.book.circuits, key=lambda c: (c.source, c.target))
            self.book.release(data.draw(st.sampled_from(some)))

    @invariant()
    def limits_hold(self):
        live = [peer for peer, until in self.until.items() if until > self.now]
        assert sum(self.members[peer] for peer in live) <= CONFIG.max_reservations
        strangers = sum(not self.members[peer] for peer in live)
        assert strangers <= CONFIG.stranger_max_reservations
        for ip in "12":
            here = sum(self.ips[peer] == ip for peer in live)
            assert here <= CONFIG.max_reservations_per_ip
        circuits = self.book.circuits
        assert sum(c.stranger for c in circuits) <= CONFIG.stranger_max_circuits
        assert sum(not c.stranger for c in circuits) <= CONFIG.max_circuits
        for peer in "ABCDEFG":
            mine = sum(peer in (c.source, c.target) for c in circuits)
            assert mine <= CONFIG.max_circuits_per_peer
        for circuit in circuits:
            if circuit.stranger:
                assert max(circuit.carried) <= CONFIG.stranger_circuit_bytes
        busy = {peer for c in circuits for peer in (c.source, c.target)}
        assert set(self.book._budget._peers) == busy

    def teardown(self):
        """From any state: when all leave, nothing is held and anyone may come."""
        for circuit in self.book.circuits:
            self.book.release(circuit)
        self.book.sweep(self.now + CONFIG.reservation_seconds)
        assert self.book.num_reservations == 0
        assert not self.book._budget._peers
        later = self.now + CONFIG.reservation_seconds
        assert self.book.reserve("Z", "9", member=True, now=later) == 10


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=30)
