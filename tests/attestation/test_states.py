"""The transition table, exhaustively, and the standings that follow it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.standings import Standings
from attestation.states import TRANSITIONS, Event, State, Tier, advance
from fabric.core.errors import LocalProtocolError
from fabric.core.ids import PeerId

SILENCE = (Event.UNREACHABLE, Event.MISSED, Event.EXPIRED)
P = PeerId("12D3KooWpeer")


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_every_pair_moves_or_is_our_bug(state, event):
    if event in TRANSITIONS[state]:
        assert advance(state, event) is TRANSITIONS[state][event]
    else:
        assert state is State.UNKNOWN
        assert event in (Event.ACCEPTED, Event.REJECTED)
        with pytest.raises(LocalProtocolError, match=state.value):
            advance(state, event)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", SILENCE)
def test_silence_is_never_guilt(state, event):
    guilt = (State.QUARANTINED, State.REVOKED)
    after = advance(state, event)
    assert after not in guilt or after is state


@pytest.mark.parametrize("state", State)
def test_revocation_wins_from_everywhere_and_only_enrolment_leaves(state):
    assert advance(state, Event.REVOKED) is State.REVOKED
    leaving = [e for e in Event if advance(State.REVOKED, e) is not State.REVOKED]
    assert leaving == [Event.ENROLLED]


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_trust_comes_from_accepted_evidence_only(state, event):
    after = TRANSITIONS[state].get(event)
    if after is State.TRUSTED and state is not State.TRUSTED:
        assert event is Event.ACCEPTED


def trusted(interval=600.0, now=0.0):
    standings = Standings(interval)
    standings.apply(P, Event.CHALLENGED)
    standings.accept(P, Tier.SOFTWARE, 2 * interval, now)
    return standings


def test_time_alone_makes_suspect_then_unknown():
    standings = trusted()
    assert standings.of(P, 899).state is State.TRUSTED
    assert standings.of(P, 900).state is State.SUSPECT
    assert standings.of(P, 1200).state is State.UNKNOWN
    assert standings.sweep(901) == [P]
    assert standings.sweep(902) == []
    assert standings.sweep(1200) == [P]
    assert standings.known(1200) == {}


def test_only_news_makes_a_verdict():
    standings = Standings(600)
    assert standings.apply(P, Event.CHALLENGED) is None
    first = standings.accept(P, Tier.SOFTWARE, 1200, 0)
    assert first is not None
    assert first.state is State.TRUSTED
    assert standings.accept(P, Tier.SOFTWARE, 1200, 500) is None
    raised = standings.accept(P, Tier.TPM, 1200, 600)
    assert raised is not None
    assert raised.tier is Tier.TPM
    failed = standings.apply(P, Event.REJECTED, "why")
    assert failed is not None
    assert (failed.state, failed.reason) == (State.QUARANTINED, "why")
    assert standings.apply(P, Event.REJECTED, "again") is None


def test_a_late_pass_does_not_lift_a_revocation():
    standings = trusted()
    standings.apply(P, Event.REVOKED, "key stolen")
    assert standings.accept(P, Tier.TPM, 1200, 1) is None
    assert standings.of(P, 1).state is State.REVOKED
    standings.apply(P, Event.ENROLLED)
    assert standings.of(P, 1).state is State.UNKNOWN


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*Event, "accept"]), st.floats(0, 700))),
)
def test_any_order_of_events_trusts_only_with_fresh_evidence(events):
    standings, now, last = Standings(600), 0.0, None
    for event, seconds in events:
        now += seconds
        try:
            if event == "accept" or event is Event.ACCEPTED:
                standings.accept(P, Tier.SOFTWARE, 1200, now)
                last = now
            else:
                standings.apply(P, event)
        except LocalProtocolError:
            assert standings.of(P, now).state is State.UNKNOWN or not standings.known(
                now
            )
        if standings.of(P, now).state in (State.TRUSTED, State.SUSPECT):
            assert last is not None
            assert now - last < 1200
