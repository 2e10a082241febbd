"""Whatever the doctor is told, it answers every question and says what to do."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nat.doctor.core import CHECKS, diagnose
from nat.doctor.facts import (
    CircuitTried,
    ClockSample,
    Dialled,
    Facts,
    Link,
    Listening,
    Mdns,
    Members,
    PathMtu,
    PeerFacts,
    PortMapping,
    Punched,
    Reachability,
    Refusal,
    Relaying,
    Relays,
    Remembered,
    Rendezvous,
    Reservation,
)

words = st.text(st.sampled_from("abc./: "), max_size=12)
refusals = st.none() | st.builds(Refusal, words, words, words)
dialled = st.builds(Dialled, words, words, words, st.booleans())
rates = st.sampled_from([0.0, 1.0, 1e3, 1e9])
seconds = st.floats(-1e9, 1e9)
spans = st.floats(0, 1e7)


def tuples(strategy):
    return st.lists(strategy, max_size=6).map(tuple)


reachability = st.builds(
    Reachability,
    verdict=st.sampled_from(["public", "private", "unknown"]),
    confidence=st.sampled_from(["none", "low", "medium", "high"]),
    mapping=st.sampled_from(
        ["none", "endpoint_independent", "per_destination", "unknown"]
    ),
    sequential=st.booleans(),
    scope=st.sampled_from(["internet", "site", "host"]),
    external=words,
    reason=words,
)
peers = st.builds(
    PeerFacts,
    peer=words,
    not_member=refusals,
    addresses=st.none() | tuples(dialled),
    gate=refusals,
    admission=st.sampled_from(
        ["unknown", "challenged", "trusted", "suspect", "quarantined", "revoked"]
    ),
    admission_reason=words,
    connected=st.booleans(),
    path=st.sampled_from(["", "local", "direct", "punched", "relay"]),
    rtt_seconds=st.none() | st.floats(0, 10),
    last_error=refusals,
    retry_in_seconds=st.floats(0, 100),
    circuits=st.none() | tuples(st.builds(CircuitTried, words, refusals, spans, spans)),
    punched=st.none()
    | st.builds(
        Punched,
        refusal=refusals,
        seconds=spans,
        endpoints=tuples(words),
        attempts=st.integers(0, 999),
        age_seconds=spans,
    ),
    nat=st.none() | reachability,
)
any_facts = st.builds(
    Facts,
    own_version=words,
    listening=st.none()
    | st.builds(
        Listening,
        control=tuples(words),
        data=tuples(words),
        dialled=tuples(dialled),
        has_rules=st.none() | st.booleans(),
    ),
    clocks=st.none() | tuples(st.builds(ClockSample, words, seconds)),
    reachability=st.none() | reachability,
    port_mapping=st.none()
    | st.builds(
        PortMapping,
        mapped=tuples(words),
        method=words,
        public=st.booleans(),
        needless=st.booleans(),
        refusal=refusals,
    ),
    relays=st.none()
    | st.builds(
        Relays,
        held=tuples(st.builds(Reservation, words, st.none() | st.floats(0, 9))),
        wanted=st.integers(0, 3),
        refused=tuples(st.tuples(words, st.builds(Refusal, words, words))),
    ),
    relaying=st.none()
    | st.builds(
        Relaying,
        active=st.booleans(),
        volunteer=st.sampled_from(["auto", "always", "never"]),
        max_bytes_per_second=rates,
    ),
    udp=st.sampled_from([None, "answered", "blocked", "silent"]),
    ipv6=st.none() | tuples(words),
    mtus=st.none()
    | tuples(st.builds(PathMtu, words, st.integers(0, 65536), st.integers(0, 65536))),
    links=st.none() | tuples(st.builds(Link, peer=words, up=rates, down=rates)),
    versions=st.none() | st.dictionaries(words, words, max_size=5),
    bootstraps=st.none() | tuples(dialled),
    members=st.none()
    | st.builds(
        Members, known=tuples(words), connected=tuples(words), stale=tuples(words)
    ),
    rendezvous=st.none()
    | st.builds(
        Rendezvous,
        sentence=words,
        registered=st.integers(0, 3),
        failed=tuples(st.tuples(words, words)),
        unconnected=tuples(words),
    ),
    mdns=st.none()
    | st.builds(
        Mdns,
        state=st.sampled_from(["off", "idle", "starting", "announcing", "failed"]),
        reason=words,
        next_step=words,
        heard=st.integers(0, 9),
    ),
    remembered=st.none()
    | st.builds(Remembered, peers=st.integers(0, 9), problem=refusals),
    peer=st.none() | peers,
)


THEIRS = (
    *("peer.member", "peer.gate", "peer.punch", "peer.path"),
    *("port-mapping", "peers-file"),
)
"""Lines that carry the code of whoever refused."""


@pytest.mark.slow
@settings(max_examples=60)
@given(any_facts)
def test_every_line_that_is_not_ok_has_a_code_and_a_next_step(facts):
    findings = diagnose(facts)
    assert len(findings) == len(CHECKS) + (8 if facts.peer is not None else 0)
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        if finding.name not in THEIRS:
            assert re.fullmatch(r"OK|E_[A-Z0-9_]+", finding.code)
            assert (finding.code == "OK") == (finding.status == "ok")
        assert bool(finding.next_step) == (finding.status != "ok")
