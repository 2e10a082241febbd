"""Training on real daemons under faults: each run ends with one state on all peers."""

import ast
import contextlib
import re
import socket
import threading
import time

import pytest

from checkpoints.verification import verify_checkpoint
from fabric.app.client import Client
from fabric.app.home import Home
from fabric.core.errors import FabricError, Unavailable
from fabric.core.ids import short
from fabric.jobs.job_service import INTEGRITY_ERRORS
from fabric.jobs.runner import LINK_FACT
from sims.local import wait_until
from tests.integration.conftest import SETTINGS, linked

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

RUN_SECONDS = 120.0
"""Longest a run may take, and so the bound of every scenario here."""
SOON = 60.0
"""Longest wait for what takes a moment on a machine that is not busy."""
ENDLESS = 100_000
"""Rounds of a job that the test stops, however fast the machine is."""


class Follower(threading.Thread):
    """Keeps the events of a job, from a client's view, until it ends."""

    def __init__(self, job):
        super().__init__(daemon=True)
        self.events, self.error = [], None
        self._job = job
        self.start()

    def run(self):
        try:
            for event in self._job.events():
                self.events.append(event)
        except FabricError as error:
            self.error = error

    def rounds(self):
        """Rounds decided so far, as this client saw it."""
        seen = [e.facts["round"] + 1 for e in list(self.events) if e.kind == "round"]
        return max(seen, default=0)

    def await_round(self, at):
        wait_until(
            lambda: self.rounds() >= at or not self.is_alive(),
            RUN_SECONDS,
            f"round {at}",
        )
        assert self.rounds() >= at, self.error

    def await_end(self):
        self.join(RUN_SECONDS)
        assert not self.is_alive(), f"still running after round {self.rounds()}"
        assert self.error is None


def generations(mesh, job):
    """Return the members of each generation, by counter, from every daemon's log."""
    found = {}
    for peer in mesh.directory.iterdir():
        log = peer / "state" / "daemon.log"
        text = log.read_text() if log.exists() else ""
        for facts in re.findall(rf"job\.generation job={job[:8]} (\{{.*\}})", text):
            event = ast.literal_eval(facts)
            found.setdefault(event["counter"], set()).add(event["peers"])
    return found


def check_end(mesh, job, peers):
    """Check what holds after any run; return the job's row."""
    row = mesh.client(peers[0]).job(job).result()
    ids = {mesh.client(name).status().peer for name in peers}
    assert set(row.participants) == ids
    assert row.round == row.rounds
    # the coordinator compared the digest that each participant reported
    assert row.facts["peers_equal"] == len(peers)
    check_generations(mesh, job)
    return row


def check_generations(mesh, job):
    """Check that no two generations have one counter."""
    made = generations(mesh, job)
    assert all(len(members) == 1 for members in made.values()), made


def stops(mesh, job):
    """Return whether the job could be stopped: not while it changes coordinators."""
    try:
        mesh.client(mesh.names[0]).job(job).stop()
    except Unavailable:
        return False
    return True


def check_checkpoint(mesh, name, root):
    """Fetch ``root`` through peer ``name`` and verify each byte of it."""
    target = mesh.directory / "checkpoint"
    mesh.client(name).content_get(root, target)
    report = verify_checkpoint(target)
    assert report.ok, report.findings
    assert report.tensors > 0


def test_coordinator_killed_and_newcomer(mesh, form, tiny_spec, rng):
    form("p0", "p1", "p2")
    mesh.start("p3", SETTINGS)
    token = mesh.client("p0").invite()
    rounds = 24
    job = mesh.client("p0").submit(tiny_spec(rounds=rounds)).id
    watcher = mesh.client("p1").job(job)
    wait_until(lambda: knows(mesh, "p1", job), SOON, "the job to reach p1")
    follower = Follower(watcher)
    follower.await_round(rng.randint(3, 6))
    coordinator = mesh.client("p1").job(job).status().coordinator
    assert coordinator == mesh.client("p0").status().peer  # who submitted it
    time.sleep(rng.uniform(0, 0.5))  # somewhere inside a round
    mesh.kill("p0")

    # no majority, so no round, before the newcomer is there, however slow the machine
    mesh.partition([["p1"], ["p2"]])
    mesh.client("p3").join(token)
    for other in ("p1", "p2"):
        wait_until(
            lambda other=other: linked(mesh, ("p3", other)), SOON, f"p3 and {other}"
        )
    wait_until(lambda: knows(mesh, "p3", job), SOON, "the job to reach p3")
    assert mesh.client("p1").job(job).status().round < rounds
    mesh.heal()
    follower.await_end()

    row = check_end(mesh, job, ["p1", "p2", "p3"])
    assert row.coordinator != coordinator
    assert row.generation >= 3  # the start, the loss, the newcomer
    check_checkpoint(mesh, "p2", str(row.facts["checkpoint"]))
    losses = [e.facts["loss"] for e in follower.events if e.kind == "round"]
    assert losses[-1] < losses[0]


def test_partition(mesh, form, tiny_spec, rng):
    """The cut-off peer pauses and says why; the others go on; healing joins them."""
    names = ["p0", "p1", "p2"]
    form(*names)
    spec = tiny_spec(rounds=ENDLESS, inner_steps=10, patience=2.0)
    job = mesh.client("p0").submit(spec).id
    alone = rng.choice(names)
    majority = [name for name in names if name != alone]
    for name in names:
        wait_until(lambda name=name: knows(mesh, name, job), SOON, f"{name}: the job")
    follower = Follower(mesh.client(majority[0]).job(job))
    follower.await_round(rng.randint(2, 4))
    mesh.partition([majority, [alone]])

    minority = mesh.client(alone)
    wait_until(
        lambda: any("no_quorum" in line for line in minority.why(job)),
        SOON,
        f"{alone} to say that it has no quorum",
    )
    held = minority.job(job).status().round
    follower.await_round(held + 3)
    assert minority.job(job).status().round == held
    assert any("next: " in line for line in minority.why(job))

    healed = follower.rounds()
    mesh.heal()

    def together():
        """Rounds since the heal to which all contributed."""
        rounds = [e.facts for e in list(follower.events) if e.kind == "round"]
        all_of = [r for r in rounds if r["contributors"] == len(names)]
        return sum(r["round"] > healed for r in all_of)

    wait_until(lambda: together() >= 3, RUN_SECONDS, "three rounds of all")
    assert len(mesh.client(alone).job(job).status().participants) == len(names)
    wait_until(lambda: stops(mesh, job), SOON, "the job to be stopped")
    follower.await_end()
    # the coordinator compared the state that each participant said it holds
    assert not [e for e in follower.events if e.kind == "diverged"]
    for name in names:
        assert INTEGRITY_ERRORS not in " ".join(mesh.client(name).status().counters)
    check_generations(mesh, job)


def test_paused_participant_is_slow_not_dead(mesh, form, tiny_spec, rng):
    """SIGSTOP for a few seconds: nobody is lost, the run ends on all peers."""
    names = ["p0", "p1", "p2"]
    form(*names)
    job = mesh.client("p0").submit(tiny_spec(rounds=20, patience=15.0)).id
    follower = Follower(mesh.client("p0").job(job))
    follower.await_round(rng.randint(2, 6))
    mesh.pause("p2")
    time.sleep(3.0)  # the fault itself: well below the patience
    mesh.resume("p2")
    follower.await_end()
    check_end(mesh, job, names)
    assert set(generations(mesh, job)) == {1}  # nobody was taken for lost


def test_tensors_bypass_control_api_and_bystanders(mesh, form, tiny_spec):
    """Only participants' data-plane sockets carry parameters.

    The bytes of the control socket are counted by a proxy in front of it; those of the
    daemons by their RPC counters.
    """
    names = ["p0", "p1", "p2"]
    form(*names)
    rounds = 10
    proxy = CountingProxy(
        mesh.directory / "proxy.sock", Home.find(mesh.directory / "p0").control_socket
    )
    with contextlib.closing(proxy):
        client = Client(proxy.path)
        spec = tiny_spec(rounds=rounds, inner_steps=40, min_peers=2, max_peers=2)
        job = client.submit(spec)
        follower = Follower(job)
        follower.await_end()
        row = job.result()
    assert len(row.participants) == 2

    takers = {short(peer) for peer in row.participants}
    links = {k: int(v) for k, v in row.facts.items() if k.startswith(LINK_FACT)}
    named = {k.removeprefix(LINK_FACT) for k in links if ">" in k}
    assert {end for link in named for end in link.split(">")} <= takers

    one_payload = max(links[LINK_FACT + link] for link in named) / rounds
    assert proxy.total < one_payload
    for name in names:
        counters = mesh.client(name).status().counters
        rpc = counters["sent_bytes:rpc"] + counters["received_bytes:rpc"]
        assert rpc < one_payload


class CountingProxy:
    """Passes the connections of a Unix socket on and counts their bytes."""

    def __init__(self, path, target):
        self.path, self.total = path, 0
        self._target, self._threads = target, []
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        self._start(self._accept)

    def close(self):
        self._server.close()
        for thread in self._threads:
            thread.join(5)

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self._start(self._pass_on, client)

    def _pass_on(self, client):
        daemon = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with client, daemon:
            daemon.connect(str(self._target))
            back = threading.Thread(target=self._pump, args=(daemon, client))
            back.start()
            self._pump(client, daemon)
            back.join()

    def _pump(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.total += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def knows(mesh, name, job):
    return any(row.job == job for row in mesh.client(name).jobs())
