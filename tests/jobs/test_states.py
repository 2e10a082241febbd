from __future__ import annotations

import contextlib
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import LocalProtocolError, RemoteProtocolError
from fabric.core.ids import PeerId
from fabric.jobs.event_log import EventLog
from fabric.jobs.liveness import Liveness
from fabric.jobs.messages import CODEC, Beat, Done, Join
from fabric.jobs.outbox import Outbox
from fabric.jobs.states import (
    RANK,
    TRANSITIONS,
    JobState,
    JobStatus,
    Trigger,
    advance,
    fold,
    is_over,
    merge,
)
from fabric.jobs.views import is_news

states = st.sampled_from(JobState)


def test_every_transition_goes_up_the_lattice_and_the_rest_is_our_bug():
    for state, trigger in product(JobState, Trigger):
        if trigger in TRANSITIONS[state]:
            assert RANK[advance(state, trigger)] >= RANK[state]
        else:
            with pytest.raises(LocalProtocolError, match=trigger.value):
                advance(state, trigger)
    assert {s for s in JobState if is_over(s)} == {
        JobState.DONE,
        JobState.FAILED,
        JobState.CANCELLED,
    }


@given(states, states, states)
def test_merging_is_a_join(a, b, c):
    assert merge(a, b) == merge(b, a)
    assert merge(a, merge(b, c)) == merge(merge(a, b), c)
    assert merge(a, a) == a


def test_the_newest_epoch_speaks_for_the_job():
    old = JobStatus(state=JobState.RUNNING, counter=2, round=9)
    new = JobStatus(state=JobState.RUNNING, counter=3, round=4)
    assert fold([new, old]) == fold([old, new]) == new
    assert fold([]) is None


@given(st.binary(max_size=300))
def test_job_messages_survive_any_bytes(data):
    with contextlib.suppress(RemoteProtocolError):
        CODEC.decode_untrusted(data)


def test_an_unknown_end_is_refused_at_the_door():
    raw = CODEC.encode(Done()).replace(b"done", b"gone")
    with pytest.raises(RemoteProtocolError):
        CODEC.decode_untrusted(raw)


def test_events_stay_in_order_across_coordinators():
    first, second = EventLog(3), EventLog(3)
    before = [first.add(2, 0.0, "round", "", {}) for _ in range(5)]
    after = second.add(3, 0.0, "generation", "", {})
    assert after.seq > before[-1].seq
    assert [e.seq for e in first.since(0)] == [e.seq for e in before[-3:]]
    second.merge(before)
    assert [e.seq for e in second.since(0)] == [
        before[-2].seq,
        before[-1].seq,
        after.seq,
    ]
    assert second.since(after.seq) == []


def test_the_outbox_keeps_the_newest_of_each_kind_until_it_is_answered():
    outbox, peer = Outbox(1.0), PeerId("p")
    first, second = Join("j"), Join("j")
    outbox.put(peer, "join", first, 0.0)
    assert outbox.take(0.0) == [(peer, first)]
    assert outbox.take(0.0) == []
    outbox.failed(peer, first, 0.0)
    assert outbox.next_timeout() == 1.0
    assert outbox.take(0.9) == []
    outbox.put(peer, "join", second, 0.9)
    [(_, sent)] = outbox.take(0.9)
    outbox.answered(peer, first)
    assert sent is second
    assert not outbox.empty
    outbox.answered(peer, second)
    assert outbox.empty


def test_silence_alone_is_not_loss():
    liveness, peer = Liveness(5.0), PeerId("p")
    liveness.watch([peer], 0.0)
    assert liveness.lost(100.0) == frozenset(), "we slept: nobody failed"
    liveness.failed(peer)
    assert liveness.lost(100.0) == frozenset()
    liveness.failed(peer)
    assert liveness.lost(4.9) == frozenset()
    assert liveness.lost(5.0) == {peer}
    liveness.heard(peer, 101.0)
    assert liveness.lost(200.0) == frozenset()


def test_a_beat_is_small():
    assert len(CODEC.encode(Beat("j" * 64, 3, 4))) < 150


def test_numbers_alone_wait_and_everything_else_is_written_at_once() -> None:
    known = JobStatus(state=JobState.RUNNING, counter=1, round=3)
    ahead = JobStatus(state=JobState.RUNNING, counter=1, round=4, facts={"loss": 2.0})
    over = JobStatus(state=JobState.DONE, counter=1, round=4)
    assert is_news(known, None, late=False)
    assert not is_news(known, known, late=True)
    assert not is_news(ahead, known, late=False)
    assert is_news(ahead, known, late=True)
    assert is_news(over, known, late=False)
