import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat.relay.token_bucket import TokenBucket


def test_a_burst_passes_and_then_the_rate():
    bucket = TokenBucket(1000, 500)
    assert bucket.take(500, 10.0) == 0
    assert bucket.take(100, 10.0) == pytest.approx(0.1)
    assert bucket.take(100, 10.1) == pytest.approx(0.1)
    assert bucket.wait_seconds(10.2) == pytest.approx(0.0)


def test_idle_time_saves_no_more_than_the_burst():
    bucket = TokenBucket(1000, 500)
    bucket.take(500, 0.0)
    assert bucket.take(500, 3600.0) == 0
    assert bucket.take(500, 3600.0) == pytest.approx(0.5)


def test_a_clock_that_steps_back_gives_nothing():
    bucket = TokenBucket(1000, 100)
    bucket.take(100, 10.0)
    assert bucket.take(100, 5.0) == pytest.approx(0.1)
    assert bucket.wait_seconds(10.1) == pytest.approx(0.0)


def test_what_was_not_used_is_given_back():
    bucket = TokenBucket(1000, 100)
    bucket.take(600, 0.0)
    bucket.give_back(500)
    assert bucket.wait_seconds(0.0) == 0
    bucket.give_back(500)
    assert bucket.take(200, 0.0) == pytest.approx(0.1)


def test_no_limit_never_waits():
    bucket = TokenBucket(math.inf, 0)
    assert bucket.take(1 << 40, 0.0) == 0
    assert bucket.wait_seconds(0.0) == 0


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, -1), (math.nan, 1)])
def test_senseless_settings_are_an_error(rate, burst):
    with pytest.raises(ValueError, match="rate above 0"):
        TokenBucket(rate, burst)


@given(
    st.floats(1, 1e9),
    st.integers(0, 1 << 20),
    st.lists(
        st.tuples(st.integers(1, 1 << 17), st.floats(0, 0.5)), min_size=1, max_size=200
    ),
)
def test_senders_that_wait_stay_within_rate_and_burst(rate, burst, pieces):
    """Simulate one sender on virtual time; compare with the closed form."""
    bucket = TokenBucket(rate, burst)
    now = sent = 0.0
    for size, pause in pieces:
        now += bucket.take(size, now)
        sent += size
        assert sent <= burst + rate * now + 1e-6 * sent + 1e-3
        now += pause


@given(st.floats(1e3, 1e9), st.integers(1, 1 << 17))
def test_a_greedy_sender_gets_the_rate_within_a_percent(rate, size):
    bucket = TokenBucket(rate, size)
    now = 0.0
    for _ in range(1000):
        now += bucket.take(size, now)
    assert 1000 * size / now == pytest.approx(rate, rel=0.01)


def test_what_may_pass_at_once_is_known():
    bucket = TokenBucket(1000, 500)
    assert bucket.available(0.0) == 500
    bucket.take(600, 0.0)
    assert bucket.available(0.05) == pytest.approx(-50)
    assert TokenBucket(math.inf, 0).available(0.0) == math.inf
