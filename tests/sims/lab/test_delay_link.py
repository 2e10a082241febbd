"""The queue of a delayed link: order, delay, bounds, reproducible loss."""

import random

from hypothesis import given
from hypothesis import strategies as st

from sims.lab.delay_link import DelayQueue

ARRIVALS = st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=50)), max_size=30
)


def queue_of(delay=0.5, max_bytes=10_000, loss=0.0, seed=1):
    return DelayQueue(delay, max_bytes, loss, random.Random(seed))


@given(arrivals=ARRIVALS, delay=st.floats(0, 2))
def test_frames_leave_in_order_each_delay_later(arrivals, delay):
    queue, now, expected = queue_of(delay), 0.0, []
    for pause, frame in arrivals:
        now += pause
        queue.push(now, frame)
        expected.append((now + delay, frame))
    for due, frame in expected:
        assert queue.next_due() == due
        assert queue.pop(due - 1e-6) is None
        assert queue.pop(due) == frame
    assert queue.next_due() is None
    assert queue.held_bytes == 0


@given(arrivals=ARRIVALS, bound=st.integers(1, 200))
def test_never_holds_more_than_its_bound(arrivals, bound):
    queue = queue_of(max_bytes=bound)
    for _, frame in arrivals:
        queue.push(0.0, frame)
        assert queue.held_bytes <= bound
    popped = []
    while (frame := queue.pop(0.5)) is not None:
        popped.append(frame)
    assert queue.dropped + len(popped) == len(arrivals)


def survivors(seed):
    queue = queue_of(delay=0.0, loss=0.3, seed=seed)
    for number in range(200):
        queue.push(0.0, bytes([number]))
    return [queue.pop(0.0) for _ in range(200 - queue.dropped)]


def test_loss_is_drawn_from_the_seed():
    assert survivors(1) == survivors(1) != survivors(2)
    assert 100 < len(survivors(1)) < 180
