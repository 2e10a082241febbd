"""What a relay has promised and carries: reservations, circuits, budgets. Pure.

    reserve    a peer may be reached through us, until it expires or disconnects
    connect    a circuit to a peer with a reservation, within the limits of both ends
    take       bytes of a circuit: the seconds to wait, or the end of its allowance
    release    the circuit is over

Members and strangers have separate limits, so that strangers can use a relay to be
admitted and cannot use up what members need. A refusal has relay v2's status code and
is counted by its reason. Nothing here is larger than the limits in the configuration.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from fabric.core.ids import PeerId
from nat.relay.config import RelayConfig
from nat.relay.messages import UNLIMITED, Limit, Status
from nat.relay.rates import ByteBudget, RequestRates

MAX_ACCOUNTS = 1024
"""Peers whose carried bytes are remembered; the smallest account goes first."""


class Refusal(msgspec.Struct, frozen=True):
    """Why not: a status for the wire, a reason for counters and logs."""

    status: Status
    reason: str


@dataclass(frozen=True)
class _Held:
    ip: str
    member: bool
    expires_at: float


@dataclass(eq=False)
class Circuit:
    """One circuit through us.

    Attributes:
        source: Who asked for it.
        target: Whose reservation it uses.
        limit: What it may carry.
        stranger: Whether it runs on the strangers' budget.
        ends_at: When its duration is over; infinity without a limit.
        carried: Bytes from the source, bytes from the target.
    """

    source: PeerId
    target: PeerId
    limit: Limit
    stranger: bool
    ends_at: float
    carried: list[int] = field(default_factory=lambda: [0, 0])


class RelayBook:
    """See the module. ``now`` is monotonic seconds.

    Args:
        config: The limits.

    Attributes:
        refused: How often each reason was given.
        carried: Bytes carried for each peer, at either end.
    """

    def __init__(self, config: RelayConfig) -> None:
        self.refused: Counter[str] = Counter()
        self.carried: Counter[PeerId] = Counter()
        self._config = config
        self._held: dict[PeerId, _Held] = {}
        self._circuits: set[Circuit] = set()
        self._budget = ByteBudget(config)
        self._peer_rates = RequestRates(
            config.requests_per_second, config.request_burst
        )
        # an office behind one address may ask as often as a few peers
        self._ip_rates = RequestRates(
            4 * config.requests_per_second, 4 * config.request_burst
        )

    @property
    def num_reservations(self) -> int:
        """Reservations that are held, expired ones included until the next sweep."""
        return len(self._held)

    def serves(self, peer: PeerId) -> bool:
        """Return whether ``peer`` has a reservation here, or an end of a circuit."""
        ends = ((circuit.source, circuit.target) for circuit in self._circuits)
        return peer in self._held or any(peer in pair for pair in ends)

    @property
    def circuits(self) -> frozenset[Circuit]:
        """The circuits that are open."""
        return frozenset(self._circuits)

    def request(self, peer: PeerId, ip: str, now: float) -> Refusal | None:
        """Return None if ``peer`` may ask for something now."""
        by_peer = self._peer_rates.allows(peer, now)
        if by_peer and self._ip_rates.allows(ip, now):
            return None
        return self.refuse(Status.RESOURCE_LIMIT_EXCEEDED, "requests_per_second")

    def reserve(
        self, peer: PeerId, ip: str, *, member: bool, now: float
    ) -> float | Refusal:
        """Return how many seconds the reservation of ``peer`` lasts from now.

        A peer has one; asking again renews it.

        Args:
            peer: Who is to be reached.
            ip: Where it connects from.
            member: Whether the gate admits it.
            now: Monotonic seconds.
        """
        self.sweep(now)
        config = self._config
        others = [held for other, held in self._held.items() if other != peer]
        alike = sum(held.member == member for held in others)
        room = config.max_reservations if member else config.stranger_max_reservations
        if alike >= room:
            which = "reservations" if member else "stranger_reservations"
            return self.refuse(Status.RESERVATION_REFUSED, which)
        if sum(held.ip == ip for held in others) >= config.max_reservations_per_ip:
            return self.refuse(Status.RESERVATION_REFUSED, "reservations_per_ip")
        self._held[peer] = _Held(ip, member, now + config.reservation_seconds)
        return config.reservation_seconds

    def connect(
        self,
        source: PeerId,
        target: PeerId,
        *,
        members: bool,
        now: float,
        reserved: bool = True,
    ) -> Circuit | Refusal:
        """Return a new circuit; give it back with :meth:`release`.

        Args:
            source: Who asks.
            target: Whom it wants to reach.
            members: Whether the gate admits both ends.
            now: Monotonic seconds.
            reserved: Whether the target must have asked for circuits.
        """
        held = self._held.get(target)
        if reserved and (held is None or now >= held.expires_at):
            return self.refuse(Status.NO_RESERVATION, "no_reservation")
        if source == target:
            return self.refuse(Status.PERMISSION_DENIED, "to_itself")
        why = self._full(source, target, members=members)
        if why:
            return self.refuse(Status.RESOURCE_LIMIT_EXCEEDED, why)
        limit = self.limit(members=members)
        seconds = limit.duration_seconds or math.inf
        circuit = Circuit(source, target, limit, not members, now + seconds)
        self._circuits.add(circuit)
        self._budget.open(circuit.source, circuit.target, circuit)
        return circuit

    def limit(self, *, members: bool) -> Limit:
        """Return what a circuit of members, or of strangers, may carry."""
        config = self._config
        if not members:
            return Limit(
                duration_seconds=config.stranger_circuit_seconds,
                data_bytes=config.stranger_circuit_bytes,
            )
        if not (config.circuit_seconds or config.circuit_bytes):
            return UNLIMITED
        return Limit(
            duration_seconds=config.circuit_seconds, data_bytes=config.circuit_bytes
        )

    def _full(self, source: PeerId, target: PeerId, *, members: bool) -> str:
        config = self._config
        strangers = sum(circuit.stranger for circuit in self._circuits)
        if not members and strangers >= config.stranger_max_circuits:
            return "stranger_circuits"
        if members and len(self._circuits) - strangers >= config.max_circuits:
            return "circuits"
        for peer in (source, target):
            mine = sum(peer in (c.source, c.target) for c in self._circuits)
            if mine >= config.max_circuits_per_peer:
                return "circuits_per_peer"
        return ""

    def take(
        self, circuit: Circuit, direction: int, num_bytes: int, now: float
    ) -> float | Refusal:
        """Take ``num_bytes`` of the budgets; return the seconds to wait.

        A refusal ends the circuit: both its ends are to be reset.

        Args:
            circuit: Which carries them.
            direction: 0 from the source, 1 from the target.
            num_bytes: How many.
            now: Monotonic seconds.
        """
        most = circuit.limit.data_bytes
        if most and circuit.carried[direction] + num_bytes > most:
            return self.refuse(Status.RESOURCE_LIMIT_EXCEEDED, "circuit_bytes")
        circuit.carried[direction] += num_bytes
        for peer in (circuit.source, circuit.target):
            self._account(peer, num_bytes)
        return self._budget.take(
            circuit.source,
            circuit.target,
            circuit,
            num_bytes,
            now,
            stranger=circuit.stranger,
        )

    def _account(self, peer: PeerId, num_bytes: int) -> None:
        if peer not in self.carried and len(self.carried) >= MAX_ACCOUNTS:
            del self.carried[min(self.carried, key=self.carried.__getitem__)]
        self.carried[peer] += num_bytes

    def promote(self, circuit: Circuit, now: float) -> None:
        """Let ``circuit`` run on the members' budget: both its ends are members now.

        Whoever was admitted through a circuit keeps it. Without a free place it stays
        what it is.
        """
        members = sum(not each.stranger for each in self._circuits)
        if circuit.stranger and members < self._config.max_circuits:
            circuit.stranger = False
            circuit.limit = self.limit(members=True)
            circuit.ends_at = now + (circuit.limit.duration_seconds or math.inf)

    def release(self, circuit: Circuit) -> None:
        """The circuit is over. Idempotent."""
        if circuit in self._circuits:
            self._circuits.discard(circuit)
            self._budget.close(circuit.source, circuit.target, circuit)

    def forget(self, peer: PeerId) -> None:
        """``peer`` disconnected: its reservation is void (spec, "Reservation")."""
        self._held.pop(peer, None)

    def sweep(self, now: float) -> None:
        """Drop what has expired."""
        over = [peer for peer, held in self._held.items() if now >= held.expires_at]
        for peer in over:
            del self._held[peer]

    def refuse(self, status: Status, reason: str) -> Refusal:
        """Count a refusal and return it."""
        self.refused[reason] += 1
        return Refusal(status, reason)
