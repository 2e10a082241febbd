"""Workers and daemons are killed; training goes on from the state kept in memory."""

import logging
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from fabric.app.checkpoints import hot_folder
from fabric.app.home import Home
from fabric.core.errors import Unavailable
from fabric.jobs.spec import CheckpointSpec
from sims.local import wait_until
from tests.integration.test_train import ENDLESS, RUN_SECONDS, Follower, stops

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.scenario, pytest.mark.slow]

SETTINGS = ("train.worker_threads=1", "replication.period_seconds=1")


def spec_of(tiny, *, min_peers, max_peers, inner_steps=60):
    spec = tiny(
        rounds=ENDLESS,
        inner_steps=inner_steps,
        min_peers=min_peers,
        max_peers=max_peers,
        patience=4.0,
    )
    return msgspec.structs.replace(spec, checkpoint=CheckpointSpec(replicas=1))


def hot_of(mesh, name):
    return hot_folder(Home.find(Path(mesh.peer(name).home)))


def hot_rounds(mesh, name):
    """Return the rounds whose state a peer keeps in memory."""
    folder = hot_of(mesh, name)
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(n.split(".")[1]) for n in names if n.count(".") == 2)


def workers_of(mesh, name):
    """Return the pids of a daemon's training workers."""
    daemon, found = mesh.peer(name).pid, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat[1]) == daemon and b"training.worker" in line:
            found.append(int(entry.name))
    return found


def rounds_of(follower):
    return [e.facts["round"] for e in list(follower.events) if e.kind == "round"]


def generations_of(follower):
    return [e.facts["round"] for e in list(follower.events) if e.kind == "generation"]


def await_more(follower, after):
    """Return the seconds until a round after ``after`` is decided."""
    began = time.monotonic()
    follower.await_round(after + 1)
    return time.monotonic() - began


@pytest.fixture
def cleaned(mesh):
    """Remove what daemons that a test killed left in memory."""
    yield mesh
    for name in [p.name for p in mesh.directory.iterdir() if p.is_dir()]:
        home = Home.find(mesh.directory / name)
        shutil.rmtree(hot_folder(home), ignore_errors=True)


def test_a_job_of_one_peer_survives_its_worker_and_its_daemon(cleaned, form, tiny_spec):
    mesh = cleaned
    form("a", "b", settings=SETTINGS)
    job = mesh.client("b").submit(spec_of(tiny_spec, min_peers=1, max_peers=1))
    only = participant(mesh)
    buddy = "b" if only == "a" else "a"
    wait_until(lambda: hot_rounds(mesh, buddy), RUN_SECONDS, "the buddy's copy")

    # the worker: its daemon has the state at hand
    follower = Follower(mesh.client(buddy).job(job.id))
    at = last_round(mesh, job)
    for pid in workers_of(mesh, only):
        os.kill(pid, signal.SIGKILL)
    log.info("recovery of a worker: %.1f s", await_more(follower, at + 1))

    # the daemon: the state outlives it in the machine's memory
    at, kept = last_round(mesh, job), hot_rounds(mesh, only)
    mesh.kill(only)
    began = time.monotonic()
    mesh.start(only, SETTINGS)
    wait_until(lambda: last_round(mesh, job) > at + 1, RUN_SECONDS, "the next round")
    log.info("recovery of a daemon: %.1f s", time.monotonic() - began)
    first = first_round_since(mesh, job, only)
    assert kept[-1] - 1 <= first, (kept, first)

    # the machine: the buddy has the state
    wait_until(lambda: hot_rounds(mesh, buddy)[-1:] > [at], RUN_SECONDS, "a copy")
    at = last_round(mesh, job)
    mesh.kill(only)
    shutil.rmtree(hot_of(mesh, only))
    kept = hot_rounds(mesh, buddy)
    began = time.monotonic()
    mesh.start(only, SETTINGS)
    wait_until(lambda: last_round(mesh, job) > at + 1, RUN_SECONDS, "the next round")
    log.info("recovery of a machine: %.1f s", time.monotonic() - began)
    assert kept[-1] <= first_round_since(mesh, job, only)
    mesh.client(only).job(job.id).stop()
    wait_until(lambda: not hot_rounds(mesh, only), RUN_SECONDS, "nothing left")


def participant(mesh):
    """Return the name of the one peer that takes part."""

    found = []

    def one_works():
        found[:] = [n for n in mesh.names if workers_of(mesh, n)]
        return len(found) == 1

    wait_until(one_works, RUN_SECONDS, "a worker")
    return found[0]


def last_round(mesh, job):
    """Return the newest round that a living peer knows of."""
    rows = [row for name in mesh.names for row in mesh.client(name).jobs()]
    return max((row.round for row in rows if row.job == job.id), default=0)


def first_round_since(mesh, job, name):
    """Return the round that the newest generation began with."""
    events = mesh.client(name).job(job.id).events(follow=False)
    return [e.facts["round"] for e in events if e.kind == "generation"][-1]


def test_a_job_survives_the_death_of_all_its_workers_and_of_one_daemon(
    cleaned, form, tiny_spec
):
    mesh = cleaned
    names = ("a", "b", "c")
    form(*names, settings=SETTINGS)
    job = mesh.client("a").submit(
        spec_of(tiny_spec, min_peers=3, max_peers=3, inner_steps=10)
    )
    wait_until(
        lambda: all(hot_rounds(mesh, n)[-1:] > [1] for n in names),
        RUN_SECONDS,
        "states in memory",
    )

    # all workers at once: nobody computes again what was kept
    at = last_round(mesh, job)
    kept = max(hot_rounds(mesh, name)[-1] for name in names)
    for pid in [pid for name in names for pid in workers_of(mesh, name)]:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: last_round(mesh, job) > at + 1, RUN_SECONDS, "the next round")
    log.info("recovery of all workers: %.1f s", time.monotonic() - began)
    coordinator = mesh.client("a").job(job.id).status().coordinator
    chair = next(n for n in names if mesh.client(n).status().peer == coordinator)
    assert min(at - 2, kept) <= first_round_since(mesh, job, chair)

    # one daemon, while the others go on
    victim = next(n for n in names if n != chair)
    wait_until(lambda: all_take_part(mesh, job, names), RUN_SECONDS, "all three")
    mesh.kill(victim)
    began, at = time.monotonic(), last_round(mesh, job)
    mesh.start(victim, SETTINGS)
    wait_until(
        lambda: workers_of(mesh, victim) and hot_rounds(mesh, victim)[-1:] > [at],
        RUN_SECONDS,
        "the restarted peer to hold a new state",
    )
    log.info("recovery of one daemon of three: %.1f s", time.monotonic() - began)
    wait_until(lambda: stops(mesh, job.id), RUN_SECONDS, "the job to be stopped")


def all_take_part(mesh, job, names):
    """Return whether every peer trains."""
    row = mesh.client(names[0]).job(job.id).status()
    return len(row.participants) == len(names) and all(
        workers_of(mesh, name) for name in names
    )


def test_a_job_whose_states_are_all_gone_goes_on_from_its_newest_checkpoint(
    cleaned, form, tiny_spec
):
    mesh, names = cleaned, ("a", "b")
    form(*names, settings=SETTINGS)
    spec = spec_of(tiny_spec, min_peers=2, max_peers=2, inner_steps=20)
    saves = CheckpointSpec(every_rounds=2, keep=2, replicas=2)
    job = mesh.client("a").submit(msgspec.structs.replace(spec, checkpoint=saves))
    wait_until(lambda: saved_roots(mesh, job), RUN_SECONDS, "a checkpoint")
    saved = saved_roots(mesh, job)

    # both machines die with their memory: their disks alone are left
    for name in names:
        mesh.kill(name)
    for name in names:
        shutil.rmtree(hot_of(mesh, name), ignore_errors=True)
    began = time.monotonic()
    for name in names:
        mesh.start(name, SETTINGS)
    wait_until(lambda: events_of(mesh, job, "generation"), RUN_SECONDS, "a new start")
    at = events_of(mesh, job, "generation")[-1].facts["round"]
    wait_until(lambda: last_round(mesh, job) > at + 1, RUN_SECONDS, "the next round")
    log.info("recovery from a checkpoint: %.1f s", time.monotonic() - began)
    assert at >= max(saved), "the newest checkpoint is taken"
    assert not events_of(mesh, job, "restarted")
    for restored in events_of(mesh, job, "restored"):  # where the coordinator did it
        assert restored.facts["round"] == at
        assert restored.facts["root"] == saved.get(at, restored.facts["root"])
    wait_until(lambda: stops(mesh, job.id), RUN_SECONDS, "the job to be stopped")


def saved_roots(mesh, job):
    """Return round -> root of the checkpoints that the job's log tells of."""
    found = events_of(mesh, job, "checkpoint")
    return {event.facts["round"]: event.facts["root"] for event in found}


def events_of(mesh, job, kind):
    """Return the events of a kind that any peer tells of."""
    told = []
    for name in mesh.names:
        with suppress(Unavailable):  # it just started
            told += mesh.client(name).job(job.id).events(follow=False)
    return [event for event in told if event.kind == kind]
