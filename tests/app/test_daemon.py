"""A real daemon: what it refuses to start with, and how it ends."""

import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fabric.app.client import connect
from fabric.core.errors import Unavailable
from fabric.jobs.spec import JobSpec, ModelSpec, OuterSpec, TrainSpec
from sims.local import start_time_of, wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

START_SECONDS = 60.0
END_SECONDS = 15.0
"""Longest an orderly end may take: jobs have 5 s to leave, services a few more."""
AT_ONCE_SECONDS = 4.0
"""Less than jobs have to leave."""


@pytest.fixture
def start(short_dir):
    """Return a function that starts a daemon and waits until it answers."""
    running = []

    def start(name, *flags, listen="/ip4/127.0.0.1/tcp/0"):
        home = short_dir / name
        home.mkdir(exist_ok=True)
        argv = [sys.executable, "-m", "fabric.app.cli", "up", "--home", str(home)]
        argv += ["--listen", listen, *flags]
        with (home / "log").open("ab") as log:
            daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
        running.append(daemon)
        daemon.home = home
        wait_until(lambda: _answers(daemon), START_SECONDS, f"{name} to answer")
        return daemon

    try:
        yield start
    finally:
        for daemon in running:
            if daemon.poll() is None:
                daemon.kill()
            daemon.wait()


def _answers(daemon):
    assert daemon.poll() is None, (daemon.home / "log").read_text()
    try:
        connect(daemon.home).status()
    except Unavailable:
        return False
    return True


def descendants(pid):
    """Return (pid, start time) of every process below ``pid``."""
    found = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found |= {(child, start_time_of(child))} | descendants(child)
    return found


def alive(processes):
    return [pid for pid, started in processes if start_time_of(pid) == started]


def start_job(daemon, name):
    """Start an endless one-peer job; return its processes once it trains."""
    client = connect(daemon.home)
    client.mesh_init(name)
    model = ModelSpec(hidden_size=32, intermediate_size=64, num_layers=1)
    outer = OuterSpec(rounds=100_000, inner_steps=5)
    job = client.submit(
        JobSpec(name=name, model=model, train=TrainSpec(batch_size=1, outer=outer))
    )
    wait_until(lambda: job.status().round >= 1, 60, "the first round")
    workers = descendants(daemon.pid)
    assert workers
    return workers


def test_bad_settings_are_refused_by_name(fabric, short_dir):
    home = short_dir / "misspelt"
    (home / "data").mkdir(parents=True)
    (home / "config.toml").write_text("[store]\nsync_period_second = 3\n")
    done = fabric("up", "--home", home)
    assert done.code == 2
    assert "unknown setting store.sync_period_second" in done.err
    assert "did you mean store.sync_period_seconds?" in done.err

    (home / "config.toml").write_text("")
    done = fabric("up", "--home", home, "--set", "store.sync_period_seconds=often")
    assert done.code == 2
    assert "$.store.sync_period_seconds" in done.err
    done = fabric("up", "--home", home, "--set", "log_level")
    assert done.code == 2
    assert "'log_level' is not key=value" in done.err


def test_unusable_home(fabric, short_dir):
    (short_dir / "file").write_text("not a directory")
    done = fabric("up", "--home", short_dir / "file" / "home")
    assert done.code == 2
    assert "cannot create" in done.err
    assert "--home" in done.err
    assert "Traceback" not in done.err

    done = fabric("up", "--home", short_dir / ("long" * 30))
    assert done.code == 2
    assert "shorter directory" in done.err


def test_home_that_cannot_be_made(fabric):
    done = fabric("up", "--home", "/proc/fabric")  # not even by root
    assert done.code == 2
    assert "cannot create /proc/fabric" in done.err


def test_damaged_state_is_refused_not_replaced(fabric, short_dir):
    data = short_dir / "damaged" / "data"
    data.mkdir(parents=True)
    (data / "identity.key").write_bytes(b"short")
    (data / "identity.key").chmod(0o600)
    done = fabric("up", "--home", data.parent)
    assert done.code == 2
    assert "is not an identity key" in done.err
    assert (data / "identity.key").read_bytes() == b"short"

    (data / "identity.key").unlink()
    (data / "mesh.json").write_bytes(b"{")
    done = fabric("up", "--home", data.parent)
    assert done.code == 2
    assert "mesh.json" in done.err
    assert "Traceback" not in done.err
    assert (data / "mesh.json").read_bytes() == b"{"


def test_second_daemon_on_the_same_data_folder(fabric, start):
    first = start("twice")
    peer = connect(first.home).status().peer
    done = fabric("up", "--home", first.home)
    assert done.code == 2
    assert "E_DATA_FOLDER_IN_USE" in done.err
    assert "fabric down" in done.err
    assert connect(first.home).status().peer == peer  # the first is not disturbed


def test_port_in_use(fabric, start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        daemon = start("port", listen=f"/ip4/127.0.0.1/tcp/{port}")
        done = fabric("mesh", "init", "lab", "--home", daemon.home, "--json")
        assert done.code == 2
        assert done.refusal["code"] == "E_PORT_IN_USE"
        assert str(port) in done.refusal["reason"]
        assert done.refusal["next_step"]
        assert connect(daemon.home).status().state == "no mesh"  # and it still answers
        assert fabric("down", "--home", daemon.home).code == 0
        assert daemon.wait(END_SECONDS) == 0

    # a member listens as soon as it starts
    daemon = start("port")
    connect(daemon.home).mesh_init("lab")
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(END_SECONDS) == 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        done = fabric("up", "--home", daemon.home, "--listen", listen)
    assert done.code == 2
    assert "E_PORT_IN_USE" in done.err
    assert "next: " in done.err
    assert "Traceback" not in done.err


def test_idle_daemon_ends_as_told(fabric, start):
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        daemon = start("idle")
        daemon.send_signal(number)
        assert daemon.wait(END_SECONDS) == status
    daemon = start("idle")
    done = fabric("down", "--home", daemon.home, "--json")
    assert (done.code, done.json) == (0, {"down": True})
    assert daemon.wait(END_SECONDS) == 0
    assert not (daemon.home / "data" / "control.sock").exists()


def test_interrupt_once_leaves_cleanly(start):
    daemon = start("once", "--set", "train.worker_threads=1")
    workers = start_job(daemon, "once")
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(END_SECONDS) == 130
    wait_until(lambda: not alive(workers), 15, "the workers to be gone")


def test_interrupt_twice_ends_at_once(start):
    daemon = start("again", "--set", "train.worker_threads=1")
    workers = start_job(daemon, "again")
    daemon.send_signal(signal.SIGINT)
    # two signals that are pending together are delivered as one
    wait_until(
        lambda: b"daemon.ending" in _log(daemon) or _ended(daemon),
        END_SECONDS,
        "the end",
        poll=0.01,
    )
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(AT_ONCE_SECONDS) == 130
    wait_until(lambda: not alive(workers), 15, "the workers to be gone")

    # nothing committed is lost, and the folder is free for the next daemon
    daemon = start("again", "--set", "train.worker_threads=1")
    assert [row.name for row in connect(daemon.home).jobs()] == ["again"]


def _log(daemon):
    return (daemon.home / "log").read_bytes()


def _ended(daemon):
    return daemon.poll() is not None
