"""What is remembered of the ways to each peer, and how the doctor tells it."""

from fabric.core.errors import NoRoute
from fabric.core.ids import PeerId
from nat.doctor.sources import from_circuits, from_punch
from nat.history import (
    MAX_ENDPOINTS,
    MAX_PEERS,
    MAX_RELAYS,
    History,
    PunchNotes,
    outcome,
)
from nat.punch.facts import FAILED, NatFacts

BOB = PeerId("bob")
R1, R2 = PeerId("x" * 44 + "relay-01"), PeerId("x" * 44 + "relay-02")
NO = NoRoute("it is full", code="E_RELAY_FULL", next_step="another one")


def test_nothing_is_known_of_a_peer_that_was_never_tried():
    assert History().of(BOB) is None
    assert from_punch(None, "", 0.0) is None


def test_relays_are_told_the_latest_first_each_with_its_last_outcome():
    history = History()
    history.on_circuit(BOB, R1, outcome(1.0, 1.5, NO))
    history.on_circuit(BOB, R2, outcome(2.0, 2.1))
    history.on_circuit(BOB, R1, outcome(5.0, 5.25))
    first, second = from_circuits(history.of(BOB), now=10.0)
    assert (first.relay, first.refusal, first.seconds) == ("relay-01", None, 0.25)
    assert (second.relay, second.age_seconds) == ("relay-02", 7.9)
    history.on_circuit(BOB, R1, outcome(6.0, 6.5, NO))
    told = from_circuits(history.of(BOB), now=10.0)[0].refusal
    assert (told.code, told.reason, told.next_step) == (
        *("E_RELAY_FULL", "it is full", "another one"),
    )


def test_a_punch_is_told_with_what_was_dialled_and_how_long_it_took():
    history = History()
    notes = PunchNotes(
        endpoints=(("203.0.113.9", 4001), ("2001:db8::1", 5)),
        tries=17,
        peer=NatFacts(mapping="address_dependent"),
    )
    error = NoRoute("no connection crossed both NATs", code=FAILED)
    history.on_punch(BOB, "control", outcome(0.0, 9.0), PunchNotes())
    history.on_punch(BOB, "data", outcome(10.0, 13.0, error), notes)
    told = from_punch(history.of(BOB), "", now=20.0)
    assert told.endpoints == ("203.0.113.9:4001", "[2001:db8::1]:5")
    assert (told.seconds, told.attempts, told.age_seconds) == (3.0, 17, 7.0)
    assert told.refusal.reason == "no connection crossed both NATs"
    assert history.of(BOB).nat.mapping == "address_dependent"
    # a later punch whose other side says nothing does not make us forget its NAT
    history.on_punch(BOB, "data", outcome(30.0, 30.1), PunchNotes())
    assert history.of(BOB).nat.mapping == "address_dependent"
    assert from_punch(history.of(BOB), "", now=31.0).refusal is None


def test_a_punch_that_worked_but_left_us_on_a_relay_says_why():
    history = History()
    history.on_punch(BOB, "control", outcome(0.0, 0.2), PunchNotes())
    told = from_punch(history.of(BOB), "the data plane is still relayed", now=1.0)
    assert told.refusal.reason == "the data plane is still relayed"
    assert from_punch(None, "not agreed", 1.0).refusal.code == FAILED


def test_it_is_bounded():
    history = History()
    for number in range(MAX_PEERS + 5):
        history.on_circuit(PeerId(f"p{number}"), R1, outcome(0.0, 1.0))
    assert len(history) == MAX_PEERS
    assert history.of(PeerId("p0")) is None
    for number in range(MAX_RELAYS + 5):
        history.on_circuit(BOB, PeerId(f"r{number}"), outcome(0.0, 1.0))
    assert len(history.of(BOB).circuits) == MAX_RELAYS
    many = PunchNotes(endpoints=tuple(("192.0.2.1", n) for n in range(99)))
    history.on_punch(BOB, "data", outcome(0.0, 1.0), many)
    assert len(history.of(BOB).punches["data"].endpoints) == MAX_ENDPOINTS
