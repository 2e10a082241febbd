"""Which NATs can be punched, and which ports a sequential one will map."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat.punch.facts import (
    FAILED,
    IMPOSSIBLE,
    MAX_PORT_STEP,
    NatFacts,
    can_punch,
    explain_failure,
    learn_mapping,
    predict_ports,
)

CONE = NatFacts("endpoint_independent", "address_and_port_dependent")
CONE_BY_ADDRESS = NatFacts("endpoint_independent", "address_dependent")
FULL_CONE = NatFacts("endpoint_independent", "endpoint_independent")
SYMMETRIC = NatFacts("address_dependent", "address_and_port_dependent")
SEQUENTIAL = NatFacts("address_dependent", "address_and_port_dependent", False, 1)
PUBLIC = NatFacts("endpoint_independent", "endpoint_independent", public=True)
UNKNOWN_FILTER = NatFacts("endpoint_independent")
FACTS = st.builds(
    NatFacts,
    st.sampled_from(["endpoint_independent", "address_dependent", "unknown"]),
    st.sampled_from(
        [
            "endpoint_independent",
            "address_dependent",
            "address_and_port_dependent",
            "unknown",
        ]
    ),
    st.booleans(),
    st.integers(-MAX_PORT_STEP, MAX_PORT_STEP),
)


@pytest.mark.parametrize(
    ("one", "other", "possible"),
    [
        (CONE, CONE, True),
        (CONE, SYMMETRIC, False),
        (SYMMETRIC, SYMMETRIC, False),
        (SYMMETRIC, CONE_BY_ADDRESS, True),
        (SYMMETRIC, FULL_CONE, True),
        (SYMMETRIC, PUBLIC, True),
        (SYMMETRIC, UNKNOWN_FILTER, True),
        (SYMMETRIC, NatFacts(), True),
        (SEQUENTIAL, CONE, True),
        (SEQUENTIAL, SYMMETRIC, False),
        (SEQUENTIAL, SEQUENTIAL, True),
    ],
)
def test_table(one, other, possible):
    for own, peer in ((one, other), (other, one)):
        decision = can_punch(own, peer)
        assert decision.allowed == possible
        if not possible:
            assert decision.code == IMPOSSIBLE
            assert "symmetric" in decision.reason
            assert decision.next_step


@given(FACTS, FACTS)
def test_both_sides_decide_alike_and_one_site_is_always_possible(own, peer):
    assert can_punch(own, peer).allowed == can_punch(peer, own).allowed
    assert can_punch(own, peer, same_site=True).allowed
    if not can_punch(own, peer).allowed:
        assert "address_dependent" in (own.mapping, peer.mapping)
        assert not own.public
        assert not peer.public


@given(FACTS, FACTS)
def test_a_failure_has_a_reason(own, peer):
    reason, may_pass = explain_failure(own, peer, 3.0)
    assert reason
    if "address_dependent" not in (own.mapping, peer.mapping):
        assert may_pass
    assert FAILED != IMPOSSIBLE


def test_the_side_that_is_hard_is_named():
    assert "our NAT maps" in can_punch(SYMMETRIC, CONE).reason
    assert "the peer's NAT maps" in can_punch(CONE, SYMMETRIC).reason


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["192.0.2.1", "192.0.2.2"]), st.integers(1024, 65535)
        ),
        max_size=3,
    ),
    FACTS,
)
def test_learning(observed, known):
    learnt = learn_mapping(observed, known)
    assert (learnt.filtering, learnt.public) == (known.filtering, known.public)
    if len(observed) < 2:
        assert learnt == known
    elif len(set(observed)) == 1:
        assert learnt.mapping == "endpoint_independent"
        assert learnt.port_step == 0
    else:
        assert learnt.mapping == "address_dependent"
        if learnt.port_step:
            assert observed[0][0] == observed[1][0]
            assert observed[0][1] + learnt.port_step == observed[1][1]


@given(st.integers(1024, 65535), st.integers(-MAX_PORT_STEP, MAX_PORT_STEP))
def test_predictions_are_few_ports_beyond_the_last(port, step):
    found = predict_ports(port, step)
    assert len(found) == len(set(found)) <= 6
    assert all(1024 <= p <= 65535 for p in found)
    assert all((p - port) * step > 0 for p in found)
    if 1024 <= port + step <= 65535 and step:
        assert found[0] == port + step


def test_a_connection_in_between_is_allowed_for():
    assert predict_ports(2000, 1) == (2001, 2002, 2003)
    assert predict_ports(2000, 2) == (2002, 2004, 2006, 2001, 2003)
    assert predict_ports(2000, -1) == (1999, 1998, 1997)
