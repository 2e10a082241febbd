"""The network changes under a transfer or a call: both go on within their deadlines."""

import os
import threading
import time

import pytest

from fabric.core.errors import FabricError
from sims.lab.measure import Pair, measure_pairs
from sims.lab.namespaces import obstacle
from sims.lab.topology import NatKind, Shape, Site
from sims.local import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.scenario,
    pytest.mark.slow,
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-"),
]

WHOLE = int(os.environ.get("SOAK_FACTOR", "1")) > 1
RELAYS = (Site(name="relay-0"), Site(name="relay-1"))
RATE_MBIT = 60.0
CONTENT_BYTES = (64 if WHOLE else 32) << 20
"""At least 4 s at that rate."""
PROGRESS_BYTES = 4 << 20
"""Received since: more than what was on its way; half a second at that rate."""
RESUME_SECONDS = 10.0
READY_SECONDS = 30.0
LEAVE_SECONDS = 10.0
"""A silent connection is doubted after 2 s and given up 2 s later; then another relay
is dialled."""
CALL_SECONDS = 15.0
"""A call without a deadline of its own has 10 s, and its dial as many: it may wait for
what is left of a dial that others began."""


def home(name, kind=NatKind.CONE):
    return Site(name=name, kind=kind, shape=Shape(rate_mbit=RATE_MBIT))


class Transfer:
    """One content, fetched in a thread."""

    def __init__(self, lab, root, path):
        self._lab = lab
        self._failure = None
        self._thread = threading.Thread(target=self._fetch, args=(root, path))
        self._start = lab.network.received_bytes("there")
        self._thread.start()

    def _fetch(self, root, path):
        try:
            self._lab.client("there").content_get(root, path)
        except FabricError as exc:
            self._failure = exc

    @property
    def running(self):
        return self._thread.is_alive()

    def received(self):
        return self._lab.network.received_bytes("there") - self._start

    def wait_for(self, count, seconds):
        """Return the seconds until ``count`` more bytes have arrived."""
        start, before = time.monotonic(), self.received()
        wait_until(
            lambda: self.received() >= before + count or not self.running,
            seconds,
            f"{count} B more of the transfer",
        )
        return time.monotonic() - start

    def finish(self, seconds):
        self._thread.join(seconds)
        assert not self.running
        if self._failure is not None:
            raise self._failure


class Calls:
    """Calls one after the other, in a thread, while the block lasts."""

    def __init__(self, lab, caller, callee):
        self._call = lambda: list(lab.client(caller).ping(lab.peer(callee), 1))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest, self.failed, self.codes = 0.0, 0, set()
        self.bug = None

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _run(self):
        while not self._over.wait(0.05):
            start = time.monotonic()
            try:
                self._call()
            except FabricError as exc:
                self.failed += 1
                self.codes.add(exc.code)
            except Exception as exc:
                self.bug = exc
                raise
            self.longest = max(self.longest, time.monotonic() - start)


CHANGES = {
    "renumbered where it is received": lambda net: net.renumber("there"),
    "renumbered where it is sent": lambda net: net.renumber("here"),
    "gateway swapped": lambda net: net.swap_gateway("here", NatKind.SYMMETRIC),
    "host moved": lambda net: net.move_host("there", "cafe"),
}


SHORT = ("renumbered where it is received", "gateway swapped")
"""What `make test` has time for; `make soak AREA=nat` runs all."""


@pytest.mark.parametrize("change", CHANGES if WHOLE else SHORT)
def test_a_transfer_resumes(formed, tmp_path, capsys, change):
    cafe = home("cafe", NatKind.RST)
    lab, joined = formed(*RELAYS, home("here"), home("there"), cafe)
    (pair,) = measure_pairs(lab, [Pair("here", "there")], joined, READY_SECONDS)
    assert pair.as_expected
    source = tmp_path / "source"
    source.write_bytes(os.urandom(CONTENT_BYTES))
    root = lab.client("here").content_add(source)
    transfer = Transfer(lab, root, tmp_path / "copy")
    transfer.wait_for(CONTENT_BYTES // 4, READY_SECONDS)
    assert transfer.running
    told = lab.client("there").content_progress(root)
    assert 0 < told.num_held < told.num_blocks == CONTENT_BYTES >> 20
    with Calls(lab, "here", "there") as calls:
        CHANGES[change](lab.network)
        took = transfer.wait_for(PROGRESS_BYTES, RESUME_SECONDS)
        transfer.finish(60)
        after = list(lab.client("here").ping(lab.peer("there"), 1))
    with capsys.disabled():
        print(
            f"\n{change}: 4 MiB more after {took:.1f} s; {calls.failed} calls failed "
            f"({', '.join(sorted(calls.codes)) or '-'}), the longest took "
            f"{calls.longest:.1f} s; then {after[0].path}"
        )
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert calls.bug is None
    assert calls.longest < CALL_SECONDS


def busiest(lab, hosts, work):
    """Return which of ``hosts`` received most while ``work`` ran."""
    before = {host: lab.network.received_bytes(host) for host in hosts}
    work()
    return max(hosts, key=lambda host: lab.network.received_bytes(host) - before[host])


def test_a_black_holed_relay_is_left(formed, capsys):
    homes = (home(name, NatKind.SYMMETRIC) for name in "ab")
    lab, joined = formed(*RELAYS, Site(name="relay-2"), *homes)
    (pair,) = measure_pairs(lab, [Pair("a", "b")], joined, READY_SECONDS)
    assert pair.path == "relay"

    def call(count=1):
        return list(lab.client("a").ping(lab.peer("b"), count))

    hole = busiest(lab, lab.public, lambda: call(200))
    lab.network.black_hole(hole)
    start = time.monotonic()

    def answers():
        try:
            return bool(call())
        except FabricError:
            return False

    wait_until(answers, LEAVE_SECONDS, f"another way than {hole}")
    took = time.monotonic() - start
    with capsys.disabled():
        print(f"\n{hole} black-holed: left after {took:.1f} s")
    assert took < LEAVE_SECONDS
