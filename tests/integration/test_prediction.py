"""Seven real daemons against what the simulator says of seven peers.

Bytes are what the kernel counted on the daemons' TCP connections, all planes together,
less what they send when nobody writes. Pushes wait two seconds here, in daemons and
simulation alike: so the time until everybody has a write is the store's, not the
scheduler's of a busy machine.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time

import pytest

from crdt_store.config import StoreConfig
from sims.local import wait_until
from sims.prediction import predict

NAMES = [f"peer-{i}" for i in range(7)]
STORE = StoreConfig(push_batch_seconds=2.0)
SETTINGS = ("train.worker_threads=1", "store.push_batch_seconds=2.0")
WRITES, EVERY_SECONDS = 40, 0.5
TOLERANCE = 0.25

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


def sent_during(mesh, action) -> int:
    """Bytes that all daemons send while ``action`` runs."""
    before = sent_bytes(mesh)
    action()
    return sum(now - before.get(at, 0) for at, now in sent_bytes(mesh).items())


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


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss (iproute2)")
def test_bytes_and_time_of_writes_are_as_predicted(mesh):
    mesh.start_all(NAMES, SETTINGS)
    mesh.create_mesh(NAMES[0], "lab")
    token = mesh.client(NAMES[0]).invite(uses=9)
    for name in NAMES[1:]:
        mesh.client(name).join(token)

    def linked() -> bool:
        views = [mesh.client(name).status() for name in NAMES]
        return all(sum(p.connected for p in view.peers) >= 6 for view in views)

    wait_until(linked, 60, "all links")
    settled(mesh)
    seconds = WRITES * EVERY_SECONDS + STORE.push_batch_seconds + 1

    def write() -> None:
        started = time.monotonic()
        for at in range(WRITES):
            mesh.client(NAMES[0]).invite(uses=1)
            time.sleep(max(0.0, started + (at + 1) * EVERY_SECONDS - time.monotonic()))
        time.sleep(max(0.0, started + seconds - time.monotonic()))

    quiet = sent_during(mesh, lambda: time.sleep(seconds))
    busy = sent_during(mesh, write)
    per_write = (busy - quiet) / WRITES
    spread = statistics.median(spread_seconds(mesh) for _ in range(3))
    predicted = predict(len(NAMES), WRITES, EVERY_SECONDS, STORE)
    print(f"\nper write {per_write:.0f} B, spread {spread:.2f} s; {predicted}")
    assert per_write == pytest.approx(predicted.bytes_per_write, rel=TOLERANCE)
    assert spread == pytest.approx(predicted.spread_seconds, rel=TOLERANCE)


def settled(mesh) -> None:
    """Wait until two looks in a row find little traffic: joining is over."""
    quiet = 0
    for _ in range(20):
        sent = sent_during(mesh, lambda: time.sleep(3.0))
        quiet = quiet + 1 if sent < 30_000 else 0
        if quiet == 2:
            return
    pytest.fail("the mesh never calmed down")
