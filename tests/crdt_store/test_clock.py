"""The clock never repeats a stamp, over restarts and jumps of the wall clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crdt_store.clock import RESERVE_SECONDS, HybridClock, stamp, wall_seconds

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), st.floats(-5, 5)),
        st.tuples(st.just("restart"), st.floats(-5, 5)),
        st.tuples(st.just("observe"), st.floats(-100, 100)),
    ),
    max_size=60,
)


@given(STEPS)
def test_stamps_increase_for_ever(steps) -> None:
    wall, disk, clock = 1e9, 0, HybridClock()
    given_out: list[int] = []
    highest_wall = wall
    for action, amount in steps:
        if action == "observe":
            clock.observe(stamp(wall + amount), wall)
            continue
        wall += amount
        highest_wall = max(highest_wall, wall)
        if action == "restart":
            clock = HybridClock(disk)
            continue
        hlc = clock.tick(wall)
        mark = clock.mark_to_save(wall)
        if mark is not None:
            assert mark >= hlc
            disk = mark
            clock.saved(mark)
        given_out.append(hlc)
    assert given_out == sorted(set(given_out))
    # neither restarts nor others' clocks push ours past half the tolerance
    if given_out:
        assert wall_seconds(given_out[-1]) <= highest_wall + 31


def test_a_thousand_quick_restarts_do_not_run_ahead() -> None:
    disk = 0
    for _ in range(1000):
        clock = HybridClock(disk)
        hlc = clock.tick(1e9)
        disk = clock.mark_to_save(1e9) or disk
    assert wall_seconds(hlc) <= 1e9 + RESERVE_SECONDS + 1.1


def test_a_full_sync_covers_many_stamps() -> None:
    clock, saves = HybridClock(), 0
    for n in range(10_000):
        now = 1e9 + n / 1000
        clock.tick(now)
        mark = clock.mark_to_save(now)
        if mark is not None:
            saves += 1
            clock.saved(mark)
    assert saves <= 3


def test_our_own_past_is_followed_without_limit() -> None:
    clock = HybridClock()
    clock.observe(stamp(2e9), 1e9, own=True)
    assert clock.tick(1e9) > stamp(2e9)
