"""How soon each pair of a laboratory's hosts can call each other, and over what."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from fabric.core.errors import FabricError
from sims.lab.expected import can_be_direct
from sims.lab.lab import Lab

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 0.5
"""Between two questions to a daemon: it has other work than to answer us."""
THREADS = 8
DIRECT_PATHS = frozenset({"direct", "punched"})


class PairResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one pair.

    Attributes:
        kinds: Of their sites, "cone/symmetric".
        first_path: What carried the first call; empty if there was none.
        first_rpc_seconds: From the later join to the end of the first call.
        direct_seconds: From the later join to the first call on a direct path.
        path: What carried the last call.
        rtt_ms: Of the last call.
        can_be_direct: Whether the NATs allow it.
        failure: Code and reason of the last failure when no call succeeded.
    """

    one: str
    other: str
    kinds: str
    first_path: str = ""
    first_rpc_seconds: float | None = None
    direct_seconds: float | None = None
    path: str = ""
    rtt_ms: float | None = None
    can_be_direct: bool
    failure: str = ""

    @property
    def connected(self) -> bool:
        """Whether a call succeeded."""
        return bool(self.first_path)

    @property
    def as_expected(self) -> bool:
        """Whether a call succeeded, and over a direct path where there can be one."""
        wanted = DIRECT_PATHS if self.can_be_direct else {*DIRECT_PATHS, "relay"}
        return self.path in wanted


class Pair(msgspec.Struct, frozen=True):
    """Two hosts; the first calls the second."""

    one: str
    other: str


def all_pairs(hosts: Iterable[str]) -> list[Pair]:
    """Return every pair of ``hosts``, once."""
    return [Pair(a, b) for a, b in itertools.combinations(hosts, 2)]


def expects_direct(lab: Lab, pair: Pair) -> bool:
    """Return whether the NATs of a pair allow a direct path."""
    topology = lab.network.topology
    one, other = topology.site_of(pair.one), topology.site_of(pair.other)
    return one is other or can_be_direct(one.kind.behaviour, other.kind.behaviour)


def measure_pairs(
    lab: Lab, pairs: Iterable[Pair], since: Mapping[str, float], patience_seconds: float
) -> list[PairResult]:
    """Return what becomes of each pair within ``patience_seconds`` from now.

    Args:
        lab: Its hosts have joined.
        pairs: Watched side by side.
        since: Monotonic time at which each host had joined.
        patience_seconds: Of all pairs together.
    """
    until = time.monotonic() + patience_seconds
    with ThreadPoolExecutor(THREADS, "pair") as pool:
        watches = [_Watch(lab, pair, since) for pair in pairs]
        open_watches = watches
        pause = FIRST_PAUSE_SECONDS
        while open_watches and time.monotonic() < until:
            done = list(pool.map(_Watch.look, open_watches))
            pairs_left = zip(open_watches, done, strict=True)
            open_watches = [watch for watch, finished in pairs_left if not finished]
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)
    return [watch.result for watch in watches]


class _Watch:
    """One pair: calls until the path is what it can become."""

    def __init__(self, lab: Lab, pair: Pair, since: Mapping[str, float]) -> None:
        self._lab = lab
        self._pair = pair
        self._start = max(since[pair.one], since[pair.other])
        topology = lab.network.topology
        kinds = [topology.site_of(host).kind for host in (pair.one, pair.other)]
        self.result = PairResult(
            one=pair.one,
            other=pair.other,
            kinds="/".join(kinds),
            can_be_direct=expects_direct(lab, pair),
        )

    def look(self) -> bool:
        """Call once; return whether there is nothing more to wait for."""
        client = self._lab.client(self._pair.one)
        try:
            view = next(iter(client.ping(self._lab.peer(self._pair.other), 1)))
        except (FabricError, StopIteration) as exc:
            if not self.result.connected:
                self._note(failure=_text(exc))
            return False
        took = round(time.monotonic() - self._start, 3)
        if not self.result.connected:
            self._note(first_path=view.path, first_rpc_seconds=took, failure="")
        if view.path in DIRECT_PATHS and self.result.direct_seconds is None:
            self._note(direct_seconds=took)
        self._note(path=view.path, rtt_ms=round(view.rtt_ms, 2))
        return self.result.as_expected

    def _note(self, **facts: object) -> None:
        self.result = msgspec.structs.replace(self.result, **facts)


def _text(error: Exception) -> str:
    if isinstance(error, FabricError):
        return f"{error.code}: {error.reason}"
    return "the daemon gave no answer"
