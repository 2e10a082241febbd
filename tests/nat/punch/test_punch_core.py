"""Timing, retries, agreement on one socket, limits and backoff."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import ResourceExhausted
from nat.punch.backoff import Backoff
from nat.punch.config import PunchConfig
from nat.punch.core import BURST_SECONDS, RetrySchedule, SocketAgreement, round_trip
from nat.punch.limits import PunchLimits

CONFIG = PunchConfig()


@given(st.floats(0, 100), st.floats(0, 60))
def test_the_round_trip_is_bounded_whatever_the_peer_says(took, held):
    rtt = round_trip(took, held)
    assert 0 <= rtt <= 2
    assert rtt <= took


def test_the_round_trip_leaves_out_what_the_responder_spent():
    assert round_trip(0.5, 0.3) == pytest.approx(0.2)


@given(
    st.integers(0, 2**32),
    st.lists(st.floats(0, 0.3), min_size=1, max_size=200),
    st.integers(1, 150),
)
def test_tries_are_bounded_and_every_pause_is_short(seed, gaps, max_tries):
    config = PunchConfig(max_tries=max_tries)
    schedule = RetrySchedule(config, random.Random(seed), 0.0, 0)
    elapsed, tries = 0.0, 0
    for gap in gaps:
        delay = schedule.next_delay(elapsed)
        if delay is None:
            assert tries == max_tries
            return
        tries += 1
        assert 0 <= delay <= config.max_jitter_seconds
        elapsed += delay + gap
    assert tries <= max_tries


def tries_in(seconds, seconds_per_try):
    schedule = RetrySchedule(CONFIG, random.Random(1), 0.0, 0)
    elapsed, near = 0.0, 0
    while elapsed < seconds and (delay := schedule.next_delay(elapsed)) is not None:
        near += schedule.near
        elapsed += delay + seconds_per_try
    return schedule.tries, near


def test_refusals_pace_a_far_peer_and_bursts_a_near_one():
    tries, near = tries_in(3.0, 0.02)
    assert tries == 150  # each at once after the last
    assert near == 0
    tries, near = tries_in(3.0, 0.0002)
    assert 1000 < tries <= CONFIG.max_tries
    assert near >= 3.0 / BURST_SECONDS / 2


def test_patience_is_longer_than_the_way_there_and_back():
    for rtt in (0.0, 0.1, 1.0):
        schedule = RetrySchedule(CONFIG, random.Random(2), rtt, 0)
        assert all(schedule.patience() > 2 * rtt for _ in range(50))


@given(st.lists(st.integers(0, 4), max_size=12))
def test_both_ends_keep_the_same_socket(order):
    """Sockets deliver in any order, some never; the kept one is the same or none."""
    ours, theirs = b"i" * 16, b"r" * 16
    initiator = SocketAgreement(initiator=True, own=ours, peer=theirs)
    responder = SocketAgreement(initiator=False, own=theirs, peer=ours)
    replied, kept = None, None
    for sock in order:
        if replied is None or sock != replied:
            verdict = responder.judge(initiator.greeting)
            assert verdict == ("reply" if replied is None else "late")
            replied = sock if replied is None else replied
        elif kept is None:
            assert initiator.judge(responder.reply) == "won"
            kept = sock
    assert kept in (None, replied)


def test_strangers_do_not_decide_and_a_broken_choice_is_taken_back():
    agreement = SocketAgreement(initiator=False, own=b"r" * 16, peer=b"i" * 16)
    assert agreement.greeting == b""
    assert agreement.judge(b"x" * 16) == "stranger"
    assert agreement.judge(b"r" * 16) == "stranger"  # an echo of ours
    assert agreement.judge(b"i" * 16) == "reply"
    assert agreement.judge(b"i" * 16) == "late"
    agreement.broke()
    assert agreement.judge(b"i" * 16) == "reply"


def test_a_peer_that_asks_too_often_is_refused_until_later():
    limits = PunchLimits(CONFIG)
    for _ in range(CONFIG.inbound_burst):
        limits.begin_untrusted("a", 0.0)
        limits.end("a")
    with pytest.raises(ResourceExhausted) as error:
        limits.begin_untrusted("a", 0.1)
    assert error.value.code == "E_PUNCH_BUSY"
    limits.begin_untrusted("b", 0.1)
    limits.begin_untrusted("a", CONFIG.inbound_interval_seconds + 0.2)


def test_punches_at_once_are_bounded_for_one_and_for_all():
    limits = PunchLimits(CONFIG)
    for _ in range(CONFIG.max_inbound_per_peer):
        limits.begin_untrusted("a", 0.0)
    with pytest.raises(ResourceExhausted):
        limits.begin_untrusted("a", 0.0)
    for number in range(CONFIG.max_inbound - CONFIG.max_inbound_per_peer):
        limits.begin_untrusted(f"p{number}", 0.0)
    with pytest.raises(ResourceExhausted):
        limits.begin_untrusted("late", 0.0)
    limits.end("a")
    limits.begin_untrusted("late", 0.0)


def test_all_peers_together_are_bounded_too():
    limits = PunchLimits(CONFIG)
    admitted = 0
    for number in range(5000):
        try:
            limits.begin_untrusted(f"p{number}", 0.0)
        except ResourceExhausted:
            continue
        limits.end(f"p{number}")
        admitted += 1
    assert admitted == CONFIG.inbound_burst * 10


def test_open_sockets_of_one_peer_are_bounded():
    limits = PunchLimits(PunchConfig(max_accepted_sockets_per_peer=2))
    limits.socket_opened("a")
    limits.socket_opened("a")
    with pytest.raises(ResourceExhausted):
        limits.begin_untrusted("a", 0.0)
    limits.socket_closed("a")
    limits.begin_untrusted("a", 0.0)


def test_backoff_steps_and_forgets():
    backoff = Backoff((5.0, 30.0))
    assert backoff.due("a") == -math.inf
    assert backoff.failed("a", 100.0, "why") == 105.0
    assert backoff.failed("a", 105.0, "why") == 135.0
    assert backoff.failed("a", 135.0, "still") == 165.0
    assert backoff.reason("a") == "still"
    assert backoff.failed("b", 0.0, "never", may_pass=False) == math.inf
    backoff.succeeded("a")
    assert backoff.due("a") == -math.inf
    backoff.network_changed()
    assert backoff.due("b") == -math.inf
    for number in range(3000):
        backoff.failed(f"p{number}", 0.0, "x")
    assert len(backoff) <= 1024
