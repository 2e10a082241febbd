"""The trio shell of admission: whom to attest with and when; the inbound door."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from attestation.admission import Local
from attestation.config import AttestationConfig
from attestation.exchange_service import AdmissionExchanges
from attestation.messages import Admitted
from attestation.ports import AdmissionPorts
from attestation.schedule import Schedule
from attestation.standings import Standings
from attestation.states import Event, State
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.host import Host, PeerConnected
from fabric.net.ports import PROTOCOL_ATTEST

_SWEEP_SECONDS = 5.0
"""Longest time a standing outlives its end before the gate's changes show it."""


class AdmissionService:
    """Shows our evidence to peers and appraises theirs.

    Args:
        host: Opens and serves the control streams.
        local: Who we are.
        ports: The store of grants.
        standings: Shared with the gate; written by this service only.
        config: Periods and bounds.
        counters: Where refusals are counted.
        clock: Monotonic seconds.
        rng: Source of the jitter; nonces come from the system.
    """

    def __init__(
        self,
        host: Host,
        local: Local,
        ports: AdmissionPorts,
        standings: Standings,
        config: AttestationConfig,
        counters: Counters,
        *,
        clock: Callable[[], float] = trio.current_time,
        rng: random.Random | None = None,
    ) -> None:
        self._host = host
        self._ports = ports
        self._standings = standings
        self._config = config
        self._counters = counters
        self._clock = clock
        self._schedule = Schedule(
            local.signer.peer_id,
            config.reattest_interval_seconds,
            config.reattest_jitter,
            rng or random.Random(),
        )
        self._locks: dict[PeerId, trio.Lock] = {}
        self._exchanges = AdmissionExchanges(
            host,
            local,
            ports,
            standings,
            config,
            counters,
            clock=clock,
            on_attested=self._on_attested,
        )

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve admission and attest with connected peers, until cancelled."""
        events = self._host.events()
        self._host.set_handler(PROTOCOL_ATTEST, self._exchanges.serve)
        for peer in self._host.connected():
            self._on_connected(peer)
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                now = self._clock()
                self._standings.sweep(now)
                for peer in self._schedule.due(now):
                    # bounded by the connections: one turn per connected peer
                    nursery.start_soon(self._take_turn, peer)
                due = self._schedule.next_timeout()
                wait = _SWEEP_SECONDS if due is None else max(0.0, due - now)
                with trio.move_on_after(min(wait, _SWEEP_SECONDS)):
                    event = await events.receive()
                    if isinstance(event, PeerConnected):
                        self._on_connected(event.peer)
                    else:
                        self._schedule.on_disconnected(event.peer)

    async def seek(self, peer: PeerId) -> Admitted:
        """Be admitted by ``peer`` and appraise it in turn; both hold a standing then.

        Bounded by ``config.exchange_timeout_seconds``. Cancelled: neither side trusts
        the other by this exchange, or the peer alone trusts us.

        Raises:
            RemoteRefused: the peer refused us, or is itself no member of the mesh.
            IntegrityError: the peer's own evidence did not hold.
            RemoteProtocolError: the peer broke the protocol.
            Unavailable: the peer cannot be reached, left, or was slow (PeerTimeout).
        """
        async with self._turn(peer):
            return await self._exchanges.seek(peer)

    async def ensure(self, peer: PeerId) -> None:
        """Trust ``peer``: wait for the exchange under way with it, or have one.

        Raises:
            FabricError: as :meth:`seek`.
        """
        async with self._turn(peer):
            if self._standings.of(peer, self._clock()).state is not State.TRUSTED:
                await self._exchanges.seek(peer)

    @asynccontextmanager
    async def _turn(self, peer: PeerId) -> AsyncIterator[None]:
        """One exchange of ours with ``peer`` at a time: it refuses a second one."""
        # bounded by the connected peers; dropped with its last user
        lock = self._locks.setdefault(peer, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(peer, None)

    def revoke(self, peer: PeerId, reason: str) -> None:
        """Stop trusting ``peer`` now and record why; members decide for themselves."""
        verdict = self._standings.apply(peer, Event.REVOKED, reason)
        if verdict is not None:
            self._ports.verdicts.record(verdict)

    def enrol(self, peer: PeerId) -> None:
        """Let a quarantined or revoked ``peer`` be challenged again."""
        self._standings.apply(peer, Event.ENROLLED)

    def _on_attested(self, peer: PeerId) -> None:
        self._schedule.on_success(peer, self._clock())

    def _on_connected(self, peer: PeerId) -> None:
        if self._config.seek_on_connect:
            now = self._clock()
            state = self._standings.of(peer, now).state
            self._schedule.on_connected(peer, now, current=state is State.TRUSTED)

    async def _take_turn(self, peer: PeerId) -> None:
        try:
            async with self._turn(peer):
                if self._schedule.running(peer):  # else it was done meanwhile
                    await self._exchanges.seek(peer)
        except FabricError as exc:
            self._counters.add(REFUSALS, label=exc.code)
            self._schedule.on_failure(peer, self._clock())
