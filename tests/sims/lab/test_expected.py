"""The table of what can be direct, against cases that were worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sims.lab.expected import EXPECTED_DIRECT, can_be_direct, is_a_guess
from sims.lab.topology import Behaviour, NatKind

K = NatKind
KINDS = st.sampled_from(NatKind)


@pytest.mark.parametrize(
    ("one", "other", "direct"),
    [
        (K.CONE, K.CONE, True),
        (K.CONE, K.RST, True),
        (K.CONE_REMAP, K.RST, True),
        (K.CGNAT, K.CGNAT, True),
        (K.UDP_BLOCKED, K.CONE, True),
        (K.SYMMETRIC, K.NONE, True),
        (K.SYMMETRIC, K.FULL_CONE, True),
        (K.SYMMETRIC, K.CONE_ADF, True),
        (K.SYMMETRIC, K.CONE, False),
        (K.SYMMETRIC, K.RST, False),
        (K.SYMMETRIC, K.SYMMETRIC, False),
        (K.ONLY_443, K.NONE, True),
        (K.ONLY_443, K.CONE, False),
        (K.ONLY_443, K.FULL_CONE, False),
        (K.ONLY_443, K.ONLY_443, False),
    ],
)
def test_worked_out_by_hand(one, other, direct):
    assert EXPECTED_DIRECT[frozenset((one, other))] is direct


@given(one=KINDS, other=KINDS)
def test_symmetric_relation(one, other):
    a, b = one.behaviour, other.behaviour
    assert can_be_direct(a, b) == can_be_direct(b, a)
    assert is_a_guess(a, b) == is_a_guess(b, a)
    assert not (can_be_direct(a, b) and is_a_guess(a, b))


@given(one=KINDS, other=KINDS)
def test_weaker_filtering_never_hurts(one, other):
    if can_be_direct(one.behaviour, other.behaviour):
        weaker = Behaviour(
            mapping=other.behaviour.mapping,
            filtering=K.FULL_CONE.behaviour.filtering,
            only_port=other.behaviour.only_port,
        )
        assert can_be_direct(one.behaviour, weaker) or other is K.NONE


def test_only_sequential_mappings_are_guesses():
    guesses = {
        (one, other)
        for one in K
        for other in K
        if is_a_guess(one.behaviour, other.behaviour)
    }
    assert (K.SYMMETRIC_SEQ, K.CONE) in guesses
    assert all(K.SYMMETRIC_SEQ in pair for pair in guesses)
