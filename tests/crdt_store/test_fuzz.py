"""Every door that takes a peer's bytes: whatever comes, nothing worse than a refusal.

Random bytes rarely get past the first check, so most examples are valid messages with a
few bytes changed, cut or doubled.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.entry import decode_entry_untrusted
from crdt_store.grants import parse_record_untrusted
from crdt_store.intake_service import ACCEPTED, REFUSED, Intake
from crdt_store.invites import make_invite
from crdt_store.messages import PUSH, Push
from crdt_store.reconcile import Session, answer, parse_request_untrusted
from fabric.core.errors import RemoteProtocolError
from fabric.core.telemetry import Counters
from tests.crdt_store.conftest import World

SALT = bytes(8)


@st.composite
def mutations(draw, valid: list[bytes]) -> bytes:
    """One of ``valid``, with up to four places changed."""
    raw = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw)))
        match draw(st.sampled_from(["flip", "insert", "cut", "double", "number"])):
            case "flip" if at < len(raw):
                raw[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                raw[at:at] = draw(st.binary(max_size=6))
            case "cut":
                del raw[at : at + draw(st.integers(1, 20))]
            case "double":
                raw[at:at] = raw[at : at + 20]
            case "number":  # the largest numbers msgpack has, in place of small ones
                raw[at : at + 1] = b"\xcf" + b"\xff" * 8
    return bytes(raw)


@lru_cache(maxsize=1)
def corpus() -> dict[str, list[bytes]]:
    """Valid messages of each kind, as a real exchange makes them."""
    world = World()
    one, other = world.replica(), world.replica()
    _, terms = make_invite(world.admin, world.mesh, [], now=world.now - 50)
    for n in range(130):
        entry = world.entry(world.workers[n % 4], f"j/{n}/spec", bytes(n % 40))
        (one if n % 3 else other).apply(entry, world.now)
        if n % 7 == 0:
            other.apply(entry, world.now) if n % 3 else one.apply(entry, world.now)
    requests, responses, session = [], [], Session(one, SALT)
    while (data := session.next_request()) is not None:
        request = parse_request_untrusted(data)
        other.ingest_batch_untrusted(getattr(request, "entries", ()), world.now)
        response = answer(other, request)
        requests.append(data)
        responses.append(response)
        one.ingest_batch_untrusted(session.receive_untrusted(response), world.now)
    entries = [*world.authority(), terms.raw, *(e.raw for e in one.slots)][:40]
    return {
        "request": requests,
        "response": responses,
        "entry": entries,
        "push": [PUSH.encode(Push(tuple(entries[:n]))) for n in (0, 1, 7)],
    }


MUTATED = {
    kind: st.deferred(lambda kind=kind: mutations(corpus()[kind]))
    for kind in ("request", "response", "entry", "push")
}
ANY = st.binary(max_size=300)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(raw=MUTATED["request"] | ANY)
def test_requests_are_answered_or_refused(world_and_replica, raw) -> None:
    world, replica = world_and_replica
    try:
        request = parse_request_untrusted(raw)
    except RemoteProtocolError:
        return
    replica.ingest_batch_untrusted(getattr(request, "entries", ()), world.now)
    assert len(answer(replica, request)) <= 2 << 20


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(raws=st.lists(MUTATED["response"] | ANY, min_size=1, max_size=6))
def test_responses_are_taken_or_end_the_session(world_and_replica, raws) -> None:
    world, replica = world_and_replica
    session = Session(replica, SALT)
    for raw in raws:
        if session.next_request() is None:
            return
        try:
            entries = session.receive_untrusted(raw)
        except RemoteProtocolError:
            assert session.done
            return
        replica.ingest_batch_untrusted(entries, world.now)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(raw=MUTATED["entry"] | ANY)
def test_entries_and_records_are_decoded_or_refused(raw) -> None:
    try:
        entry = decode_entry_untrusted(raw)
        parse_record_untrusted(entry)
    except RemoteProtocolError:
        return


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(raw=MUTATED["push"] | ANY, extra=st.lists(MUTATED["entry"], max_size=3))
def test_whatever_is_shown_is_counted(world_and_replica, raw, extra) -> None:
    world, replica = world_and_replica
    counters = Counters()
    intake = Intake(replica, lambda: world.now, counters, lambda: None)
    try:
        raws = [*PUSH.decode_untrusted(raw).entries, *extra]
    except RemoteProtocolError:
        raws = list(extra)
    valid = set(corpus()["entry"])
    foreign = [r for r in raws if r not in valid]
    intake.shown_untrusted(raws, world.stranger.peer_id)
    counted = counters.snapshot()
    accepted = counted.get(ACCEPTED, 0)
    refused = sum(n for name, n in counted.items() if name.startswith(REFUSED))
    # every changed entry was refused, and counted unless an honest peer offers such
    assert accepted <= len(set(raws) & valid)
    assert refused <= len(foreign)
    replica.check_integrity()


@pytest.fixture(scope="module")
def world_and_replica() -> tuple:
    world = World()
    replica = world.replica()
    replica.ingest_batch_untrusted(corpus()["entry"][:30], world.now)
    return world, replica
