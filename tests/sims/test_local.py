"""What is recorded about a simulation's processes, without starting a daemon."""

import os
import subprocess
import sys

import pytest

from fabric.core.errors import ConfigError, PeerTimeout
from sims.local import LocalMesh, SimPeer, SimState, start_time_of, wait_until


def test_start_time_tells_processes_apart():
    assert start_time_of(os.getpid()) == start_time_of(os.getpid()) > 0
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = start_time_of(child.pid)
        assert started >= start_time_of(os.getpid())
    finally:
        child.kill()
        # a zombie is no process any more
        wait_until(lambda: start_time_of(child.pid) == 0, 5, "its death", poll=0.005)
        child.communicate()
    assert start_time_of(child.pid) == 0


@pytest.fixture
def saved(tmp_path):
    """A simulation of this process, of one that is gone, and of a reused pid."""
    me = os.getpid()
    peers = (
        SimPeer("me", str(tmp_path / "me"), me, start_time_of(me)),
        SimPeer("gone", str(tmp_path / "gone"), 2**22 + 1, 5),
        SimPeer("reused", str(tmp_path / "reused"), me, start_time_of(me) + 1),
    )
    mesh = LocalMesh(tmp_path)
    mesh.mesh = "abc"
    mesh._peers = {peer.name: peer for peer in peers}
    mesh._save()
    return peers


def test_state_round_trip(tmp_path, saved):
    opened = LocalMesh.open(tmp_path)
    assert opened.mesh == "abc"
    assert [opened.peer(name) for name in ("me", "gone", "reused")] == list(saved)
    assert SimState("abc", saved) == SimState("abc", tuple(opened._peers.values()))


def test_only_living_processes_of_ours_are_signalled(tmp_path, saved):
    opened = LocalMesh.open(tmp_path)
    assert opened.names == ["me"]
    opened.kill("reused")  # the pid lives, but it is somebody else's: this test
    opened.kill("gone")
    with pytest.raises(ConfigError) as error:
        opened.kill("nobody")
    assert "me, gone, reused" in error.value.next_step


def test_open_refuses_what_is_no_simulation(tmp_path):
    with pytest.raises(ConfigError, match="no simulation"):
        LocalMesh.open(tmp_path)
    (tmp_path / "sim.json").write_text('{"mesh": 1}')
    with pytest.raises(ConfigError, match=r"sim\.json"):
        LocalMesh.open(tmp_path)


def test_wait_until_gives_up():
    seen = []
    with pytest.raises(PeerTimeout, match="the moon"):
        wait_until(lambda: bool(seen.append(1)), 0.02, "the moon", poll=0.005)
    assert len(seen) > 1
