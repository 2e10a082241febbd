"""Which relays hold a reservation for us. Pure.

    candidate --probed--> measured --reserved--> held --renewed--> held
        |                     |                   |
        +------ failed -------+------ lost -------+--> waits, longer each time

Candidates are probed all at once, and the first to answer are the nearest, so they are
asked first; of those, one in another failure domain than what is held already. A relay
that allows a circuit little is held for signalling while there are no better ones.
``actions`` says what to do now, ``next_timeout`` when to ask again; what became of an
action is told with ``on_*``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fabric.core.ids import PeerId
from nat.relay.circuit_addresses import CIRCUIT, failure_domain
from nat.relay.config import CircuitConfig
from nat.relay.messages import UNLIMITED, Limit

MAX_LIFE_SECONDS = 3600.0
"""A reservation is renewed within an hour whatever the relay's clock says."""
MIN_LIFE_SECONDS = 60.0
"""And not more often than once in a while."""
STEADY_SECONDS = 5.0
"""A relay that ended a reservation sooner than this is left alone for a while."""


class Probe(msgspec.Struct, frozen=True):
    """Connect with ``relay`` and measure its round trip."""

    relay: PeerId


class Reserve(msgspec.Struct, frozen=True):
    """Ask ``relay`` for a reservation, or for a longer one."""

    relay: PeerId


Action = Probe | Reserve


@dataclass
class _Relay:
    addrs: tuple[str, ...]
    domain: str
    candidate: bool = True
    rtt_seconds: float | None = None
    busy: bool = False
    failures: int = 0
    not_before: float = 0.0
    why: str = ""
    # of a held reservation
    held: bool = False
    renew_at: float = 0.0
    announced: tuple[str, ...] = ()
    limit: Limit = UNLIMITED
    held_since: float = 0.0


class RelayStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One relay as `fabric status` shows it."""

    relay: PeerId
    held: bool
    rtt_seconds: float | None
    data: bool
    why: str


class Reservations:
    """See the module. ``now`` is monotonic seconds.

    Args:
        config: Numbers and times.
    """

    def __init__(self, config: CircuitConfig) -> None:
        self._config = config
        self._relays: dict[PeerId, _Relay] = {}
        self._wanted = True

    def set_wanted(self, wanted: bool) -> None:
        """Hold reservations, or none: the world reaches us without."""
        self._wanted = wanted
        if not wanted:
            for relay in self._relays.values():
                relay.held = False

    def set_candidates(self, candidates: Mapping[PeerId, Sequence[str]]) -> None:
        """Choose from these, best first; a relay that is held stays until it fails."""
        chosen = list(candidates)[: self._config.max_candidates]
        for peer, relay in list(self._relays.items()):
            relay.candidate = peer in chosen
            if not (relay.candidate or relay.held or relay.busy):
                del self._relays[peer]
        for peer in chosen:
            addrs = tuple(candidates[peer])
            known = self._relays.get(peer)
            if known is None:
                self._relays[peer] = _Relay(addrs, failure_domain(addrs))
            else:
                known.addrs, known.domain = addrs, failure_domain(addrs)

    def addrs_of(self, relay: PeerId) -> tuple[str, ...]:
        """Return where ``relay`` can be dialled."""
        known = self._relays.get(relay)
        return known.addrs if known else ()

    def rtt_of(self, relay: PeerId) -> float | None:
        """Return the measured round trip of ``relay``."""
        known = self._relays.get(relay)
        return known.rtt_seconds if known else None

    def expects(self, relay: PeerId) -> bool:
        """Whether circuits may come from ``relay``: held, or asked just now."""
        known = self._relays.get(relay)
        return known is not None and (known.held or known.busy)

    def announced(self) -> tuple[str, ...]:
        """Return our circuit addresses, those of the nearest relay first."""
        held = sorted(self._held(), key=_rtt)
        return tuple(addr + CIRCUIT for relay in held for addr in relay.announced)

    def status(self) -> tuple[RelayStatus, ...]:
        """Return every relay that we know of."""
        return tuple(
            RelayStatus(
                relay=peer,
                held=relay.held,
                rtt_seconds=relay.rtt_seconds,
                data=self._carries_data(relay),
                why=relay.why,
            )
            for peer, relay in self._relays.items()
        )

    # what to do

    def actions(self, now: float) -> list[Action]:
        """Return what to start now; each is answered by one ``on_*``."""
        if not self._wanted:
            return []
        found: list[Action] = [
            Reserve(peer)
            for peer, relay in self._relays.items()
            if relay.held and not relay.busy and now >= relay.renew_at
        ]
        found += self._reserve_more(now)
        if self._missing():
            found += [
                Probe(peer)
                for peer, relay in self._free(now).items()
                if relay.rtt_seconds is None
            ]
        for action in found:
            self._relays[action.relay].busy = True
        return found

    def _reserve_more(self, now: float) -> list[Action]:
        """Choose relays to ask, nearest first, other failure domains before that."""
        busy = [relay for relay in self._relays.values() if relay.busy]
        asked = [relay for relay in busy if relay.rtt_seconds is not None]
        probing = len(busy) > len(asked)
        missing = self._missing() - sum(not relay.held for relay in asked)
        measured = {
            peer: relay
            for peer, relay in self._free(now).items()
            if relay.rtt_seconds is not None
        }
        used = {r.domain for r in (*self._full(), *asked) if r.domain}
        chosen: list[Action] = []
        while len(chosen) < missing and measured:
            peer = min(
                measured, key=lambda p: (measured[p].domain in used, _rtt(measured[p]))
            )
            relay = measured.pop(peer)
            if relay.domain in used and probing:
                break  # one in another domain may still answer
            if relay.domain:
                used.add(relay.domain)
            chosen.append(Reserve(peer))
        return chosen

    def _free(self, now: float) -> dict[PeerId, _Relay]:
        return {
            peer: relay
            for peer, relay in self._relays.items()
            if relay.candidate
            and not (relay.held or relay.busy)
            and now >= relay.not_before
        }

    def _held(self) -> list[_Relay]:
        return [relay for relay in self._relays.values() if relay.held]

    def _full(self) -> list[_Relay]:
        return [relay for relay in self._held() if self._carries_data(relay)]

    def _missing(self) -> int:
        return self._config.num_relays - len(self._full())

    def _carries_data(self, relay: _Relay) -> bool:
        return self.suits_data(relay.limit)

    def suits_data(self, limit: Limit) -> bool:
        """Return whether a circuit with ``limit`` is for more than signalling."""
        config = self._config
        enough_bytes = not limit.data_bytes or limit.data_bytes >= config.min_data_bytes
        seconds = limit.duration_seconds
        return enough_bytes and (not seconds or seconds >= config.min_data_seconds)

    def next_timeout(self, now: float) -> float | None:
        """Return when :meth:`actions` may have something new, or None."""
        if not self._wanted:
            return None
        times = [r.renew_at for r in self._held() if not r.busy]
        if self._missing():
            times += [
                relay.not_before
                for relay in self._relays.values()
                if relay.candidate and not (relay.held or relay.busy)
            ]
        later = [time for time in times if time > now]
        return min(later) if later else None

    # what became of it

    def on_probed(self, relay: PeerId, rtt_seconds: float) -> None:
        """A probe was answered."""
        known = self._relays.get(relay)
        if known is not None:
            known.busy = False
            known.rtt_seconds = rtt_seconds

    def on_reserved(
        self,
        relay: PeerId,
        life_seconds: float,
        announced: Iterable[str],
        limit: Limit,
        now: float,
    ) -> None:
        """A reservation was granted or renewed.

        Args:
            relay: By whom.
            life_seconds: How long it says that it lasts; bounded here.
            announced: The relay's addresses, each ending in its id.
            limit: What a circuit may carry.
            now: Monotonic seconds.
        """
        known = self._relays.get(relay)
        if known is None:
            return
        known.busy = False
        if not self._wanted:
            return
        life = min(max(life_seconds, MIN_LIFE_SECONDS), MAX_LIFE_SECONDS)
        if not known.held:
            known.held_since = now
        known.held, known.limit, known.announced = True, limit, tuple(announced)
        known.renew_at = now + self._config.renew_fraction * life
        known.failures, known.why = 0, ""
        if len(self._full()) >= self._config.num_relays:
            for other in self._held():
                if not self._carries_data(other):
                    other.held, other.why = False, "it allows circuits too little"

    def on_failed(self, relay: PeerId, why: str, now: float) -> None:
        """A probe or a reservation failed, or was refused."""
        known = self._relays.get(relay)
        if known is None:
            return
        pauses = self._config.retry_seconds
        known.busy = known.held = False
        known.rtt_seconds = None
        known.why = why
        known.not_before = now + pauses[min(known.failures, len(pauses) - 1)]
        known.failures += 1
        if not known.candidate:
            del self._relays[relay]

    def on_lost(self, relay: PeerId, now: float) -> None:
        """The connection with ``relay`` is gone, and the reservation with it.

        A relay that had held it for a while is asked again at once: most often it is
        our own network that changed.
        """
        known = self._relays.get(relay)
        if known is not None and known.held:
            busy, lasted = known.busy, now - known.held_since
            self.on_failed(relay, "the connection with it ended", now)
            if lasted >= STEADY_SECONDS:
                known.failures, known.not_before = 0, now
            if relay in self._relays:
                self._relays[relay].busy = busy  # that attempt will tell by itself

    def network_changed(self, now: float) -> None:
        """Ask every relay again without delay: what kept it away may be over."""
        for relay in self._relays.values():
            relay.failures, relay.not_before = 0, min(relay.not_before, now)
            if not (relay.held or relay.busy):
                relay.rtt_seconds = None


def _rtt(relay: _Relay) -> float:
    return relay.rtt_seconds if relay.rtt_seconds is not None else 1e9
