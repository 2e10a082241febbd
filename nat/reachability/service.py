"""Learn whether others can reach us: observe, ask, judge; again on every change."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from fabric.core.ids import PeerId, short
from fabric.core.telemetry import DROPPED, Counters
from fabric.net.host import PeerConnected, PeerEvent
from fabric.net.tasks import collapse_group
from fabric.net.traversal_api import TraversalHost
from nat.addresses import classify, endpoint_of
from nat.reachability.autonat_client_service import AutonatAsker
from nat.reachability.config import ReachabilityConfig
from nat.reachability.core import (
    Reachability,
    announced_addrs,
    candidates,
    farther,
    judge,
    scope_of,
)
from nat.reachability.netwatch import NetworkChanged
from nat.reachability.observed import ObservedAddresses
from nat.reachability.observed_mapping import Mapping
from nat.reachability.schedule import Schedule
from nat.reachability.survey_service import Identify, Survey

log = logging.getLogger(__name__)

MIN_VOTES = 2
"""Observers without whom nothing is known of the mapping."""
EVENT_ROOM = 8
"""Verdicts that a listener may lag behind; only the last one matters."""


class Surroundings(msgspec.Struct, frozen=True):
    """What this peer knows of its own place, asked anew each round; from memory.

    Attributes:
        interfaces: Addresses of our interfaces, "ip/prefix".
        mapped: Multiaddrs that routers map to our control port.
        announced: Multiaddrs that the operator set.
        observers: "ip:port" of data-plane listeners, asked where they see our control
            port when too few connections leave from it.
    """

    interfaces: Callable[[], Sequence[str]]
    mapped: Callable[[], Sequence[str]] = tuple
    announced: tuple[str, ...] = ()
    observers: Callable[[], Sequence[str]] = tuple


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything for `fabric doctor`.

    Attributes:
        verdict: The last one.
        listening: What we listen on.
        servers: Who was asked in the last round, "PEER at IP".
        refused: Who could not be asked, and why.
        rounds: How many rounds there were.
        age_seconds: Since the last round ended; negative when there was none.
    """

    verdict: Reachability
    listening: tuple[str, ...]
    servers: tuple[str, ...]
    refused: tuple[str, ...]
    rounds: int
    age_seconds: float


class ReachabilityService:
    """Holds the verdict. Made by :func:`open_reachability`.

    Attributes:
        observed: What observers saw, of every port of ours.
    """

    def __init__(
        self,
        host: TraversalHost,
        identify: Identify,
        surroundings: Surroundings,
        config: ReachabilityConfig,
        counters: Counters,
    ) -> None:
        self.observed = ObservedAddresses()
        self._host = host
        self._around = surroundings
        self._config = config
        self._counters = counters
        asker = AutonatAsker(host, config.autonat, counters)
        self._survey = Survey(host, identify, asker, config, self.observed)
        self._verdict = Reachability()
        self._schedule = Schedule(config, trio.current_time())
        self._wake = trio.Event()
        self._in_round = False
        self._again = False
        self._listeners: list[trio.MemorySendChannel[Reachability]] = []
        self._asked: dict[PeerId, str] = {}
        self._rounds = 0
        self._ended = 0.0

    def verdict(self) -> Reachability:
        """Return the last verdict."""
        return self._verdict

    def mapping(self) -> Mapping:
        """Return what the NAT does with our control port, by what is known now."""
        port, version = self._control_port()
        return self.observed.mapping(
            port, self._own_ips(), trio.current_time(), version
        )

    def changes(self) -> trio.MemoryReceiveChannel[Reachability]:
        """Return a new bounded channel of verdicts that differ from the one before."""
        send, receive = trio.open_memory_channel[Reachability](EVENT_ROOM)
        self._listeners.append(send)
        return receive

    def announced(self, circuits: Sequence[str]) -> tuple[str, ...]:
        """Return what to announce now, given the ``circuits`` through our relays."""
        return announced_addrs(
            self._verdict,
            self._host.listen_addrs(),
            circuits,
            self._around.announced,
            self._config,
        )

    def nudge(self) -> None:
        """Have a round soon: a port mapping or an announcement changed."""
        self._schedule.hurry(trio.current_time())
        self._again = True
        self._wake.set()

    def network_changed(self, change: NetworkChanged) -> None:
        """Forget what was true of the old network, and look again."""
        if change.gateway_changed:
            self.observed.clear()
        else:
            self.observed.forget_local(change.gone_addresses)
        self.nudge()

    def report(self) -> Report:
        """Return everything that is known, for people."""
        age = trio.current_time() - self._ended if self._rounds else -1.0
        return Report(
            verdict=self._verdict,
            listening=self._host.listen_addrs(),
            servers=tuple(f"{short(p)} at {ip}" for p, ip in self._asked.items()),
            refused=tuple(
                f"{short(p)}: {why}" for p, why in self._survey.refused.items()
            ),
            rounds=self._rounds,
            age_seconds=age,
        )

    # rounds

    async def run(self) -> None:
        """Have rounds until cancelled."""
        while True:
            self._wake = trio.Event()
            with trio.move_on_at(self._schedule.due):
                await self._wake.wait()
                continue  # it may be due earlier now
            self._in_round, self._again = True, False
            await self.round()
            self._in_round = False
            if self._again:  # what the round found may be of the old network
                self._schedule.hurry(trio.current_time())

    async def follow_peers(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        """Have a round soon when somebody new can be asked, while too few agree."""
        async for event in events:
            unsure = self._is_unsure()
            # during a round, inbound strangers are the dial-backs we asked for
            if isinstance(event, PeerConnected) and unsure and not self._in_round:
                self.nudge()

    def _is_unsure(self) -> bool:
        """Whether too few agree, or a peer is farther away than those who do."""
        if self._verdict.agreeing < self._config.min_agreeing:
            return True
        scope, ips = self._verdict.scope, self._survey.direct_peers().values()
        return any(farther(ip, scope) for ip in ips)

    async def round(self) -> Reachability:
        """Observe, ask and judge once; return the verdict."""
        ips = self._survey.direct_peers()
        seen_ips = await self._survey.observe(list(ips))
        mapping = self.mapping()
        if mapping.votes < MIN_VOTES:
            port, _ = self._control_port()
            await self._survey.observe_listeners(self._around.observers(), port)
            mapping = self.mapping()
        scope = scope_of(ips.values())
        asked = candidates(
            self._host.listen_addrs(),
            self._around.mapped(),
            self._around.announced,
            mapping,
            scope,
        )[: self._config.max_addresses]
        servers = {peer: ip for peer, ip in ips.items() if classify(ip) is scope}
        verdicts = await self._survey.ask(servers, asked, seen_ips) if asked else {}
        self._asked = {peer: servers[peer] for peer in verdicts}
        verdict = judge(
            asked,
            verdicts,
            self._asked or servers,
            mapping,
            self._config,
            self._own_ips(),
        )
        self._rounds += 1
        self._ended = trio.current_time()
        self._schedule.finished(verdict.status, self._ended)
        self._publish(verdict)
        return verdict

    def _publish(self, verdict: Reachability) -> None:
        changed = _essence(verdict) != _essence(self._verdict)
        self._verdict = verdict
        if not changed:
            return
        log.info(
            "reachability.changed status=%s confidence=%s mapping=%s reason=%s",
            verdict.status,
            verdict.confidence,
            verdict.mapping.kind,
            verdict.reason,
        )
        for listener in tuple(self._listeners):
            try:
                listener.send_nowait(verdict)
            except trio.WouldBlock:
                self._counters.add(DROPPED, label="reachability")
            except trio.BrokenResourceError:
                self._listeners.remove(listener)

    def _own_ips(self) -> frozenset[str]:
        return frozenset(each.partition("/")[0] for each in self._around.interfaces())

    def _control_port(self) -> tuple[int, int]:
        """Return the listening port and IP version that NATs are about."""
        ends = [end for end in map(endpoint_of, self._host.listen_addrs()) if end]
        ends.sort(key=lambda end: end[0].version)
        return (ends[0][1], ends[0][0].version) if ends else (0, 4)

    def close(self) -> None:
        """End the channels."""
        for listener in self._listeners:
            listener.close()


def _essence(verdict: Reachability) -> tuple[object, ...]:
    """Return what a change of is news."""
    mapping = verdict.mapping
    return (
        verdict.status,
        verdict.confidence,
        verdict.scope,
        verdict.addresses,
        verdict.hint,
        verdict.ip6_only,
        mapping.kind,
        mapping.external,
    )


@asynccontextmanager
async def open_reachability(
    host: TraversalHost,
    identify: Identify,
    surroundings: Surroundings,
    config: ReachabilityConfig,
    counters: Counters,
    network: trio.MemoryReceiveChannel[NetworkChanged] | None = None,
) -> AsyncIterator[ReachabilityService]:
    """Learn and re-learn the verdict inside the block.

    Args:
        host: Whose addresses are in question.
        identify: Asks one peer where it sees us.
        surroundings: What this peer knows of its own place.
        config: Who is asked, how often.
        counters: Where dropped events are counted.
        network: Changes of the network, of a watcher.
    """
    service = ReachabilityService(host, identify, surroundings, config, counters)

    async def follow_network(
        changes: trio.MemoryReceiveChannel[NetworkChanged],
    ) -> None:
        async for change in changes:
            service.network_changed(change)

    with collapse_group():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            nursery.start_soon(service.follow_peers, host.events())
            if network is not None:
                nursery.start_soon(follow_network, network)
            try:
                yield service
            finally:
                service.close()
                nursery.cancel_scope.cancel()
