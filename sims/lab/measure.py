"""How soon each pair of a laboratory's hosts can call each other, and over what."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from fabric.core.errors import FabricError
from sims.lab.expected import can_be_direct
from sims.lab.lab import Lab

FIRST_PAUSE_SECONDS = 0.05
PAUSE_SECONDS = 0.5
"""Between two calls of a pair, later on."""
CALLS_PER_SECOND = 100
"""Of all pairs together, at most: daemons have other work."""
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


def form_and_measure(
    lab: Lab, patience_seconds: float, tell: Callable[[str], None] = lambda text: None
) -> list[PairResult]:
    """Make one mesh of started hosts; return what becomes of all pairs.

    A pair is watched from the moment that both have joined, while others join.

    Args:
        lab: Its daemons run.
        patience_seconds: Of all pairs together, from the last join on.
        tell: Told who joined.

    Raises:
        FabricError: a host could not join; the daemons have ended then.
    """
    joined: dict[str, float] = {}

    def note(host: str) -> None:
        joined[host] = time.monotonic()
        tell(f"{host} joined")

    with ThreadPoolExecutor(1, "form") as pool:
        forming = pool.submit(lab.form, (), note)

        def formed() -> bool:
            # raises why somebody could not join, which ends the measurement
            return forming.done() and bool(forming.result())

        pairs = all_pairs(lab.hosts)
        return measure_pairs(lab, pairs, joined, patience_seconds, formed)


def measure_pairs(
    lab: Lab,
    pairs: Iterable[Pair],
    joined: Mapping[str, float],
    patience_seconds: float,
    formed: Callable[[], bool] = lambda: True,
) -> list[PairResult]:
    """Return what becomes of each pair.

    Args:
        lab: Its hosts have joined, or join meanwhile.
        pairs: Watched side by side.
        joined: Monotonic time at which each host had joined; may grow meanwhile.
        patience_seconds: Of all pairs together, once everybody is there.
        formed: Whether nobody joins any more.
    """
    clock = _Clock(joined, patience_seconds, formed)
    watches = [_Watch(lab, pair, clock) for pair in pairs]
    longest = max(PAUSE_SECONDS, len(watches) / CALLS_PER_SECOND)
    # a call may block for seconds, and must not keep other pairs waiting
    with ThreadPoolExecutor(max(1, len(watches)), "pair") as pool:
        try:
            list(pool.map(lambda watch: watch.run(longest), watches))
        except BaseException:
            # nobody wants the rest: calls under way end with their daemons
            clock.stop()
            lab.halt()
            raise
    return [watch.result for watch in watches]


class _Clock:
    """When pairs begin, and when all of them have had their time."""

    def __init__(
        self, joined: Mapping[str, float], patience: float, formed: Callable[[], bool]
    ) -> None:
        self._joined = joined
        self._patience = patience
        self._formed = formed
        self._until = math.inf
        self._stopped = False

    def stop(self) -> None:
        """End all pairs' time."""
        self._stopped = True

    def started(self, pair: Pair) -> float | None:
        """Return when the later of the two had joined."""
        if pair.one not in self._joined or pair.other not in self._joined:
            return None
        return max(self._joined[pair.one], self._joined[pair.other])

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        if self._stopped:
            return True
        if self._until == math.inf and self._formed():
            self._until = time.monotonic() + self._patience
        return time.monotonic() >= self._until


class _Watch:
    """One pair: calls until the path is what it can become."""

    def __init__(self, lab: Lab, pair: Pair, clock: _Clock) -> None:
        self._lab = lab
        self._pair = pair
        self._clock = clock
        topology = lab.network.topology
        kinds = [topology.site_of(host).kind for host in (pair.one, pair.other)]
        self.result = PairResult(
            one=pair.one,
            other=pair.other,
            kinds="/".join(kinds),
            can_be_direct=expects_direct(lab, pair),
        )

    def run(self, longest_pause: float) -> None:
        """Call until the path is what it can become, or the time is over."""
        pause = FIRST_PAUSE_SECONDS
        while not self._clock.over:
            start = self._clock.started(self._pair)
            if start is not None:
                if self._look(start):
                    return
                pause = min(pause * 1.3, longest_pause)
            time.sleep(pause)

    def _look(self, start: float) -> bool:
        client = self._lab.client(self._pair.one)
        try:
            view = next(iter(client.ping(self._lab.peer(self._pair.other), 1)))
        except (FabricError, StopIteration) as exc:
            if not self.result.connected:
                self._note(failure=_text(exc))
            return False
        took = round(time.monotonic() - start, 3)
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
