"""Seven real daemons against what the simulator says of seven peers.

Bytes are what the kernel counted on the daemons' TCP connections, all planes together,
less what they send when nobody writes. Windows end when daemons have reconciled so many
times, or when everybody has a write: nothing waits for time to pass. Pushes wait two
seconds here, in daemons and simulation alike: so the time until everybody has a write
is the store's, not the scheduler's of a busy machine.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import time

import pytest

from crdt_store.config import StoreConfig
from fabric.app.control_messages import StatusView
from sims.local import wait_until
from sims.prediction import predict

NAMES = [f"peer-{i}" for i in range(7)]
STORE = StoreConfig(push_batch_seconds=2.0)
SETTINGS = ("train.worker_threads=1", "store.push_batch_seconds=2.0")
FULL = int(os.environ.get("SOAK_FACTOR", "1")) > 1
WRITES, EVERY_SECONDS = 12 if FULL else 8, 3.0
"""Of the simulation: so far apart that each write is alone, as it is here."""
QUIET_ROUNDS = 4 if FULL else 3
"""Reconciliations that each daemon starts, a period of 5 s apart."""
CALM_ROUNDS = 12
CALM_BYTES_PER_SECOND = 6000
ROUND_SECONDS = 20.0
TOLERANCE = 0.25
SYNCS = "store_syncs_total"
"""What counts the reconciliations that a daemon started."""

pytestmark = [pytest.mark.scenario, pytest.mark.slow]


def sent_bytes(mesh) -> dict[tuple[str, str], int]:
    """Bytes sent so far by socket of the daemons."""
    argv = ["ss", "-tinpH", "state", "established"]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    pids = {str(mesh.peer(name).pid) for name in NAMES}
    found, socket = {}, None
    for line in lines.splitlines():
        if not line[:1].isspace():
            holder = re.search(r"pid=(\d+)", line)
            ours = holder is not None and holder[1] in pids
            socket = tuple(line.split()[2:4]) if ours else None
        elif socket is not None and (sent := re.search(r"bytes_sent:(\d+)", line)):
            found[socket] = int(sent[1])
    return found


class Window:
    """Bytes that all daemons sent, and seconds, since it was opened."""

    def __init__(self, mesh) -> None:
        self._mesh, self._before = mesh, sent_bytes(mesh)
        self._started = time.monotonic()

    def close(self) -> tuple[int, float]:
        sent = sent_bytes(self._mesh)
        grown = sum(now - self._before.get(at, 0) for at, now in sent.items())
        return grown, time.monotonic() - self._started


def views_of(mesh) -> list[StatusView]:
    return [mesh.client(name).status() for name in NAMES]


def await_rounds(mesh, rounds: int) -> None:
    """Return once each daemon has reconciled ``rounds`` more times."""
    wanted = {v.peer: v.counters.get(SYNCS, 0) + rounds for v in views_of(mesh)}

    def done() -> bool:
        return all(v.counters.get(SYNCS, 0) >= wanted[v.peer] for v in views_of(mesh))

    wait_until(done, rounds * ROUND_SECONDS, f"{rounds} rounds", poll=0.5)


def spread_seconds(mesh) -> float:
    """From the acknowledgement of a lone write until the last member shows it."""
    waiting = {name: len(mesh.client(name).trust()) for name in NAMES}
    mesh.client(NAMES[0]).invite(uses=1)
    started = time.monotonic()
    # one at a time: who has it keeps it, so the last to be seen is not too early
    for name, before in waiting.items():
        client = mesh.client(name)
        wait_until(
            lambda c=client, b=before: len(c.trust()) > b, 30, "the invite", poll=0.02
        )
    return time.monotonic() - started


def await_calm(mesh) -> None:
    """Return once two rounds in a row find little traffic: joining is over."""
    quiet = 0
    for _ in range(CALM_ROUNDS):
        window = Window(mesh)
        await_rounds(mesh, 1)
        sent, seconds = window.close()
        quiet = quiet + 1 if sent < CALM_BYTES_PER_SECOND * seconds else 0
        if quiet == 2:
            return
    pytest.fail("the mesh never calmed down")


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss (iproute2)")
def test_bytes_and_time_of_writes_are_as_predicted(mesh):
    mesh.start_all(NAMES, SETTINGS)
    mesh.create_mesh(NAMES[0], "lab")
    token = mesh.client(NAMES[0]).invite(uses=9)
    for name in NAMES[1:]:
        mesh.client(name).join(token)

    def linked() -> bool:
        return all(sum(p.connected for p in v.peers) >= 6 for v in views_of(mesh))

    wait_until(linked, 60, "all links")
    await_calm(mesh)
    window = Window(mesh)
    await_rounds(mesh, QUIET_ROUNDS)
    quiet, seconds = window.close()
    window = Window(mesh)
    spreads = [spread_seconds(mesh) for _ in range(WRITES)]
    await_rounds(mesh, 1)  # what writes change about the next one is theirs
    busy, lasted = window.close()
    per_write = (busy - quiet / seconds * lasted) / WRITES
    # a busy machine only ever adds: the quicker ones tell the store's own time
    spread = statistics.quantiles(spreads, n=4)[0]
    predicted = predict(len(NAMES), WRITES, EVERY_SECONDS, STORE)
    print(
        f"\nper write {per_write:.0f} B, spread {spread:.2f} s,"
        f" idle {quiet / seconds / len(NAMES):.0f} B/s and peer; {predicted}"
    )
    assert per_write == pytest.approx(predicted.bytes_per_write, rel=TOLERANCE)
    assert spread == pytest.approx(predicted.spread_seconds, rel=TOLERANCE)
