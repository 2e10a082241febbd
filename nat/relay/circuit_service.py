"""Being relayed: reservations kept at near relays, circuits dialled through them."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import trio

from fabric.core.errors import FabricError, LocalProtocolError, NoRoute, PeerTimeout
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import Counters
from fabric.net.delimited import send_bytes
from fabric.net.host import PeerDisconnected
from fabric.net.ping import ping
from fabric.net.ports import Gate
from fabric.net.traversal_api import ConnectionInfo, TraversalHost
from nat.history import History, outcome
from nat.multiaddr_bytes import tcp_endpoint, tcp_multiaddr
from nat.relay.circuit import Action, Probe, Reservations
from nat.relay.circuit_addresses import announceable, by_relay, peer_of
from nat.relay.circuit_inbound_service import InboundCircuits
from nat.relay.circuit_streams_service import (
    DATA_PREFIX,
    connect,
    join,
    open_stop,
    reserve,
    socket_ends,
)
from nat.relay.config import CircuitConfig
from nat.relay.messages import (
    PROTOCOL_HOP,
    PROTOCOL_STOP,
    PROTOCOL_VIA,
    UNLIMITED,
    Limit,
)
from nat.relay.pump_service import break_stream

log = logging.getLogger(__name__)

OnData = Callable[[PeerId, socket.socket], Awaitable[None]]
"""Owns an inbound data-plane socket; the peer is what the relay claims."""


class CircuitService:
    """Keeps us reachable through relays, and reaches others through theirs.

    Args:
        host: Connects, opens and serves streams.
        gate: Who may open data-plane circuits to us.
        config: Numbers and times.
        counters: Where refusals are counted.
        addresses_of: The addresses that a peer announces, circuit addresses among them.
        neighbours: Members connected with us without a relay, but not the one asked
            about: they may be connected with it.
        on_data: Takes inbound data-plane sockets, in a task of its own.
        on_addresses: Told the circuit addresses to announce whenever they change.
        history: Told how each circuit that we dial went.

    Attributes:
        reservations: Which relays we have, for status and doctor.
    """

    def __init__(
        self,
        host: TraversalHost,
        gate: Gate,
        config: CircuitConfig,
        counters: Counters,
        *,
        addresses_of: Callable[[PeerId], Sequence[str]],
        neighbours: Callable[[PeerId], Sequence[PeerId]] = lambda peer: (),
        on_data: OnData,
        on_addresses: Callable[[tuple[str, ...]], None],
        history: History | None = None,
    ) -> None:
        self.reservations = Reservations(config)
        self._history = history if history is not None else History()
        self._host = host
        self._config = config
        self._gate = gate
        self._addresses_of = addresses_of
        self._neighbours = neighbours
        self._on_addresses = on_addresses
        self._announced: tuple[str, ...] = ()
        self._inbound = InboundCircuits(
            host, gate, config, counters, self._expects, on_data
        )
        # one token: whoever wakes the loop makes it look at everything
        self._wake, self._woken = trio.open_memory_channel[None](1)
        self._nursery: trio.Nursery | None = None

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep reservations and serve circuits until cancelled."""
        self._host.set_handler(PROTOCOL_STOP, self._inbound.serve)
        self._host.set_circuit_dialer(self.dial)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                nursery.start_soon(self._watch)
                task_status.started()
                await self._keep(nursery)
            finally:
                self._nursery = None

    def _expects(self, relay: PeerId) -> bool:
        """Return whether circuits may come from ``relay``: one of ours, or a member."""
        return (
            self.reservations.expects(relay)
            or self._gate.allows(relay, PROTOCOL_VIA).allowed
        )

    def set_candidates(self, candidates: Mapping[PeerId, Sequence[str]]) -> None:
        """Choose relays from these peers, best first, with their addresses."""
        others = {p: a for p, a in candidates.items() if p != self._host.peer_id}
        self.reservations.set_candidates(others)
        self._poke()

    def set_wanted(self, wanted: bool) -> None:
        """Hold reservations, or none because the world reaches us without."""
        self.reservations.set_wanted(wanted)
        self._poke()

    def network_changed(self) -> None:
        """Ask the relays again: reservations may lead to an address that is gone."""
        self.reservations.network_changed(trio.current_time())
        self._poke()

    # reservations

    def _poke(self) -> None:
        with suppress(trio.WouldBlock):  # then it is about to look anyway
            self._wake.send_nowait(None)

    async def _keep(self, nursery: trio.Nursery) -> None:
        while True:
            now = trio.current_time()
            for action in self.reservations.actions(now):  # bounded by the candidates
                nursery.start_soon(self._act, action)
            self._tell_addresses()
            timeout = self.reservations.next_timeout(now)
            with trio.move_on_after(3600.0 if timeout is None else timeout - now):
                await self._woken.receive()

    async def _watch(self) -> None:
        async for event in self._host.events():
            if isinstance(event, PeerDisconnected):
                self.reservations.on_lost(event.peer, trio.current_time())
                self._poke()

    def _tell_addresses(self) -> None:
        announced = self.reservations.announced()
        if announced != self._announced:
            self._announced = announced
            log.info("circuit.addresses num=%d", len(announced))
            self._on_addresses(announced)

    async def _act(self, action: Action) -> None:
        probing = isinstance(action, Probe)
        config = self._config
        seconds = config.probe_seconds if probing else config.reserve_seconds
        why = f"no answer within {seconds:.0f} s"
        failed = True
        try:
            with trio.move_on_after(seconds) as scope:
                await (self._probe if probing else self._reserve)(action.relay)
            failed = scope.cancelled_caught
        except FabricError as exc:
            why = exc.reason
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            why = f"the connection broke: {exc}"
        if failed:
            self.reservations.on_failed(action.relay, why, trio.current_time())
            log.debug("circuit.failed relay=%s why=%s", short(action.relay), why)
        self._poke()

    async def _probe(self, relay: PeerId) -> None:
        await self._reach(relay, self.reservations.addrs_of(relay))
        seconds = await ping(self._host, relay)
        self.reservations.on_probed(relay, seconds)

    async def _reserve(self, relay: PeerId) -> None:
        await self._reach(relay, self.reservations.addrs_of(relay))
        answer = await reserve(self._host, relay)
        granted = answer.reservation
        assert granted is not None
        self.reservations.on_reserved(
            relay,
            granted.expires_unix_seconds - time.time(),
            self._believed(relay, granted.addrs),
            answer.limit,
            trio.current_time(),
        )

    def _believed(self, relay: PeerId, offered: Sequence[str]) -> tuple[str, ...]:
        direct = [
            info for info in self._host.connections(relay) if info.kind != "relay"
        ]
        if not direct:
            return ()
        ip, _, port = direct[0].remote.rpartition(":")
        ip = ip.strip("[]")
        dialled = tcp_multiaddr(ip, int(port)) if direct[0].outbound else ""
        known = self.reservations.addrs_of(relay)
        return announceable(relay, ip, dialled, (*known, *offered))

    async def _reach(self, relay: PeerId, addrs: Sequence[str]) -> None:
        """Have a connection with ``relay`` that is not relayed itself.

        Raises:
            NoRoute: there is none.
        """
        await self._host.connect(relay, addrs)
        if all(info.kind == "relay" for info in self._host.connections(relay)):
            raise NoRoute(f"{short(relay)} is reached through another relay only")

    # circuits

    async def dial(
        self, relay_addr: str, peer: PeerId
    ) -> tuple[trio.abc.Stream, ConnectionInfo]:
        """Return a circuit to ``peer`` for a control connection; a CircuitDialer.

        Raises:
            NoRoute: the relay does not answer, or does not reach ``peer``.
            RemoteRefused: the relay refuses.
        """
        relay = peer_of(relay_addr)
        if relay is None or relay in (peer, self._host.peer_id):
            raise NoRoute(f"{relay_addr} is not an address of a relay between us")
        if tcp_endpoint(relay_addr) is None:  # made by `via`
            await trio.sleep(self._config.via_after_seconds)
            stream = await self._circuit(relay, (), peer, protocol=PROTOCOL_VIA)
        else:
            stream = await self._circuit(relay, (relay_addr,), peer)
        return stream, ConnectionInfo(kind="relay", outbound=True, relay=relay)

    async def _circuit(
        self,
        relay: PeerId,
        addrs: Sequence[str],
        peer: PeerId,
        first: bytes = b"",
        protocol: str = PROTOCOL_HOP,
    ) -> trio.abc.HalfCloseableStream:
        """Return a circuit whose first bytes were sent; they say it is for data."""
        began = trio.current_time()
        try:
            stream = await self._circuit_within(relay, addrs, peer, first, protocol)
        except FabricError as exc:
            ended = outcome(began, trio.current_time(), exc)
            self._history.on_circuit(peer, relay, ended)
            raise
        self._history.on_circuit(peer, relay, outcome(began, trio.current_time()))
        return stream

    async def _circuit_within(
        self,
        relay: PeerId,
        addrs: Sequence[str],
        peer: PeerId,
        first: bytes,
        protocol: str,
    ) -> trio.abc.HalfCloseableStream:
        try:
            with trio.fail_after(self._config.connect_seconds):
                stream, limit = await self._join(relay, addrs, peer, protocol)
                assert isinstance(stream, trio.abc.HalfCloseableStream)
                if first:
                    if not self.reservations.suits_data(limit):
                        await break_stream(stream)
                        raise NoRoute(
                            f"relay {short(relay)} is for signalling only: it allows a "
                            f"circuit {limit.data_bytes} B",
                            code="E_RELAY_SIGNALLING_ONLY",
                            next_step="on a member with a public address, run "
                            "`fabric up --relay-ok`",
                        )
                    await send_bytes(stream, first)
                return stream
        except trio.TooSlowError as exc:
            raise PeerTimeout(
                f"relay {short(relay)} made no circuit within "
                f"{self._config.connect_seconds:.0f} s"
            ) from exc

    async def _join(
        self, relay: PeerId, addrs: Sequence[str], peer: PeerId, protocol: str
    ) -> tuple[trio.abc.Stream, Limit]:
        if relay == self._host.peer_id:  # it reserved with us: we are its relay
            return await open_stop(self._host, peer, relay), UNLIMITED
        await self._reach(relay, addrs)
        stream, answer = await connect(self._host, relay, peer, protocol)
        return stream, answer.limit

    async def open_data(self, peer: PeerId) -> socket.socket:
        """Return a socket whose bytes a relay carries to ``peer``'s data plane.

        The peer's relays are tried nearest first, the next one beside one that does
        not answer at once; then members that are connected with us.

        Raises:
            NoRoute: no relay leads there; the reason has each relay's.
        """
        if self._nursery is None:
            raise LocalProtocolError("the circuit service does not run")
        relays = by_relay(self._addresses_of(peer), peer)
        relays.pop(peer, None)
        try:
            stream = await self._race(peer, relays)
        except NoRoute:
            neighbours = dict.fromkeys(self._neighbours(peer), ())
            if not neighbours:
                raise
            stream = await self._race(peer, neighbours, PROTOCOL_VIA)
        local, theirs = socket_ends()
        self._nursery.start_soon(join, stream, local)
        return theirs

    async def _race(
        self,
        peer: PeerId,
        relays: Mapping[PeerId, Sequence[str]],
        protocol: str = PROTOCOL_HOP,
    ) -> trio.abc.HalfCloseableStream:
        won: list[trio.abc.HalfCloseableStream] = []
        reasons: list[str] = []

        async def attempt(
            relay: PeerId, scope: trio.CancelScope, over: trio.Event
        ) -> None:
            try:
                stream = await self._circuit(
                    relay, relays[relay], peer, DATA_PREFIX, protocol
                )
            except FabricError as exc:
                reasons.append(exc.reason)
                over.set()
                return
            won.append(stream)
            scope.cancel()

        nearest = self.reservations.rtt_of
        try:
            async with trio.open_nursery() as nursery:
                for relay in sorted(relays, key=lambda r: nearest(r) or 1e9):
                    over = trio.Event()
                    nursery.start_soon(attempt, relay, nursery.cancel_scope, over)
                    with trio.move_on_after(self._config.hedge_seconds):
                        await over.wait()
        except BaseException:
            for stream in won:
                await break_stream(stream)
            raise
        for surplus in won[1:]:
            await break_stream(surplus)
        if not won:
            raise NoRoute(
                f"no relay leads to {short(peer)}: "
                + ("; ".join(reasons) or "it announces none"),
                code="E_NO_RELAY",
                next_step="`fabric why` on both peers lists their relays",
            )
        return won[0]
