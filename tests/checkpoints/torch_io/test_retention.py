"""Retention: what goes, what never goes, and what a crash leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.directories import list_steps, locate
from checkpoints.retention import (
    Retention,
    apply_retention,
    pin,
    pinned,
    surplus,
    unpin,
)
from checkpoints.verification import verify_checkpoint
from fabric.core.errors import ConfigError

steps = st.sets(st.integers(0, 60))


@given(steps, st.integers(0, 5), st.integers(0, 7), steps)
def test_the_policy(present, keep, every, kept):
    policy = Retention(keep=keep, keep_every=every)
    gone = surplus(sorted(present), policy, kept)
    left = present - set(gone)
    assert set(gone) <= present - kept
    assert not keep or set(sorted(present)[-keep:]) <= left
    assert not every or all(step % every for step in gone)
    assert keep or not gone
    # a second run finds nothing more to do
    assert surplus(sorted(left), policy, kept) == []


def test_the_latest_and_the_pinned_stay(tmp_path, lab):
    for step in (1, 2, 10, 20, 30, 31):
        lab.save(tmp_path, step)
    pin(tmp_path, 2)
    (tmp_path / "latest").write_text(
        f"step-1 {verify_checkpoint(tmp_path / 'step-1').root}\n"
    )
    policy = Retention(keep=1, keep_every=10)
    assert apply_retention(tmp_path, policy) == []  # 1: latest, 2: pin, rest: every 10
    unpin(tmp_path, 2)
    assert apply_retention(tmp_path, policy, pins=[2]) == []
    assert apply_retention(tmp_path, policy) == [2]
    assert list_steps(tmp_path) == [1, 10, 20, 30, 31]
    assert locate(tmp_path).path.name == "step-1"
    with pytest.raises(ConfigError):
        pin(tmp_path, 2)
    assert pinned(tmp_path) == set()


def test_what_a_crash_left_of_a_deleted_step_is_removed(tmp_path, lab):
    lab.save(tmp_path, 1)
    lab.save(tmp_path, 2)
    (tmp_path / "step-1").rename(tmp_path / "step-1.deleted")
    assert list_steps(tmp_path) == [2]
    lab.save(tmp_path, 1)  # written again, and deleted again before the sweep
    (tmp_path / "latest").write_text(
        f"step-2 {verify_checkpoint(tmp_path / 'step-2').root}\n"
    )
    (tmp_path / "step-1.deleted.1").mkdir()
    assert apply_retention(tmp_path, Retention(keep=1)) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2"]
