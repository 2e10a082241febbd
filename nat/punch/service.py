"""Punched data-plane sockets: on demand, ahead of demand, and for peers that ask."""

from __future__ import annotations

import logging
import math
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    NoRoute,
    RemoteProtocolError,
)
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import PROTOCOL_ERRORS, Counters
from fabric.net.host import Host, PeerConnected
from fabric.net.socket_options import set_doubt
from nat.history import History, PunchNotes, outcome
from nat.punch.backoff import Backoff
from nat.punch.config import PunchConfig
from nat.punch.exchange_service import PunchExchange, Surroundings
from nat.punch.facts import FAILED, IMPOSSIBLE
from nat.punch.limits import PunchLimits
from nat.punch.messages import PROTOCOL_PUNCH
from nat.punch.spares import Spares

logger = logging.getLogger(__name__)

Accept = Callable[[socket.socket, float], Awaitable[None]]
"""Owns a socket that a peer punched, for as long as it is used; its label must come
within the given seconds. ``DataPlane.accept_socket(sock, "punched", seconds)``."""

_LABEL_SLACK_SECONDS = 15.0
"""Our end of a peer's spare outlives it by this."""
_SWEEP_SECONDS = 1.0


@dataclass
class _Attempt:
    """A punch that outlives its caller: what it brings then becomes a spare."""

    done: trio.Event = field(default_factory=trio.Event)
    sock: socket.socket | None = None
    error: FabricError | None = None
    abandoned: bool = False


class TcpPuncher:
    """Implements ``PathProvider.punch``. Run :meth:`run` in a task.

    Args:
        host: Carries the exchange.
        config: Bounds.
        surroundings: Observers, our addresses, our NAT.
        accept: Takes the sockets that peers punched with us.
        counters: Refusals and protocol errors.
        rng: Draws the jitter.
        history: Told how each punch went, whoever asked for it.
    """

    def __init__(
        self,
        host: Host,
        config: PunchConfig,
        surroundings: Surroundings,
        accept: Accept,
        counters: Counters,
        rng: random.Random | None = None,
        history: History | None = None,
    ) -> None:
        self._host = host
        self._config = config
        self._accept = accept
        self._counters = counters
        self._history = history if history is not None else History()
        self._exchange = PunchExchange(
            host, config, surroundings, counters, rng or random.Random()
        )
        self._limits = PunchLimits(config)
        self._backoff = Backoff(config.retry_seconds)
        self._spares = Spares(config)
        self._sockets: dict[int, socket.socket] = {}
        self._lanes: dict[PeerId, trio.CapacityLimiter] = {}
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve peers and keep spares until cancelled; closes the spares then."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._host.set_handler(PROTOCOL_PUNCH, self._serve)
                nursery.start_soon(self._watch_events)
                nursery.start_soon(self._keep_spares)
                task_status.started()
        finally:
            self._nursery = None
            self._close(self._spares.clear())

    async def punch(self, peer: PeerId) -> socket.socket:
        """Return a connected, non-blocking TCP socket through both sides' NATs.

        A spare if there is one. If the caller is cancelled, the punch goes on and what
        it brings becomes a spare.

        Raises:
            NoRoute: the NATs do not allow it (E_PUNCH_IMPOSSIBLE) or not now; the
                reason says which, and so does a punch that is not tried again yet.
            FabricError: see :meth:`PunchExchange.initiate`.
        """
        spare = self._take_spare(peer)
        if spare is not None:
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled:
                self._shelve(peer, spare)
                raise
            return spare
        self._check_due(peer)
        if self._nursery is None:
            raise LocalProtocolError("the puncher does not run")
        attempt = _Attempt()
        self._nursery.start_soon(self._attempt, peer, attempt)
        try:
            await attempt.done.wait()
        except trio.Cancelled:
            attempt.abandoned = True
            if attempt.sock is not None:  # it came in the same moment
                self._shelve(peer, attempt.sock)
            raise
        if attempt.sock is None:
            raise attempt.error or NoRoute("the puncher stopped", code=FAILED)
        return attempt.sock

    def claim(self, label: bytes, sock: socket.socket) -> bool:
        """Offer a data-plane connection whose first 16 bytes are no open label.

        A peer that cannot be punched connects to our public listener instead and shows
        the nonce of the punch. Returns whether it is one; then ``sock`` is owned here.
        """
        return self._exchange.claim(label, sock)

    def num_spares(self, peer: PeerId) -> int:
        """Return how many sockets with ``peer`` are ready."""
        return self._spares.ready(peer)

    def network_changed(self) -> None:
        """Drop the spares, whose mappings are gone, and forget what was impossible."""
        self._backoff.network_changed()
        self._close(self._spares.clear())

    def doubt(self, peer: PeerId) -> None:
        """Find out soon which spares with ``peer`` are dead: their path may be.

        They are used again once it has had time to; see :meth:`Spares.doubt`.
        """
        for number in self._spares.doubt(peer, trio.current_time()):
            set_doubt(self._sockets[number], doubted=True)

    def forget(self, peer: PeerId) -> None:
        """Close the spares with ``peer``: the gate's decision about it changed."""
        self._close(self._spares.forget(peer))

    async def _attempt(self, peer: PeerId, attempt: _Attempt) -> None:
        try:
            attempt.sock = await self._punch_now(peer)
            self._spares.used(peer, trio.current_time())
            if attempt.abandoned:
                self._shelve(peer, attempt.sock)
        except FabricError as exc:
            attempt.error = exc
        finally:
            attempt.done.set()

    async def _punch_now(self, peer: PeerId) -> socket.socket:
        lane = self._lanes.setdefault(
            peer, trio.CapacityLimiter(self._config.max_outbound_per_peer)
        )
        try:
            async with lane:
                self._check_due(peer)  # another one may have failed meanwhile
                return await self._initiate(peer)
        finally:
            if not lane.borrowed_tokens and not lane.statistics().tasks_waiting:
                self._lanes.pop(peer, None)

    async def _initiate(self, peer: PeerId) -> socket.socket:
        began, notes = trio.current_time(), PunchNotes()
        try:
            sock = await self._exchange.initiate(peer, notes)
        except FabricError as exc:
            self._note(peer, began, notes, exc)
            if exc.code in (FAILED, IMPOSSIBLE):
                self._backoff.failed(
                    peer,
                    trio.current_time(),
                    exc.reason,
                    may_pass=exc.code == FAILED,
                )
            logger.info(
                "punch.failed peer=%s code=%s reason=%s",
                short(peer),
                exc.code,
                exc.reason,
            )
            raise
        self._note(peer, began, notes, None)
        self._backoff.succeeded(peer)
        now = trio.current_time()
        logger.info(
            "punch.done peer=%s ms=%.0f punch_ms=%.1f",
            short(peer),
            (now - began) * 1e3,
            notes.punch_ms(now),
        )
        self._wake.set()
        return sock

    def _note(
        self, peer: PeerId, began: float, notes: PunchNotes, error: FabricError | None
    ) -> None:
        ended = outcome(began, trio.current_time(), error)
        self._history.on_punch(peer, "data", ended, notes)

    def _check_due(self, peer: PeerId) -> None:
        due, now = self._backoff.due(peer), trio.current_time()
        if due <= now:
            return
        reason = self._backoff.reason(peer)
        if math.isinf(due):
            raise NoRoute(reason, code=IMPOSSIBLE)
        raise NoRoute(f"{reason}; next try in {due - now:.0f} s", code=FAILED)

    async def _serve(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        began = False
        started, notes = trio.current_time(), PunchNotes()

        def admit() -> None:
            nonlocal began
            self._limits.begin_untrusted(peer, trio.current_time())
            began = True

        try:
            sock = await self._exchange.respond(stream, admit, notes)
        except RemoteProtocolError as exc:
            self._counters.add(PROTOCOL_ERRORS, label="punch")
            logger.info("punch.malformed peer=%s reason=%s", short(peer), exc.reason)
            return
        except (FabricError, trio.BrokenResourceError, trio.ClosedResourceError):
            logger.debug("punch.broken peer=%s", short(peer))
            return
        finally:
            if began:
                self._limits.end(peer)
        if began:  # one that was refused for its rate is not worth a memory
            self._note(peer, started, notes, notes.error)
        if sock is None:
            return
        if self._nursery is None:
            sock.close()
            return
        self._limits.socket_opened(peer)
        self._nursery.start_soon(self._hand_over, peer, sock)

    async def _hand_over(self, peer: PeerId, sock: socket.socket) -> None:
        try:
            seconds = self._config.spare_idle_seconds + _LABEL_SLACK_SECONDS
            await self._accept(sock, seconds)
        finally:
            self._limits.socket_closed(peer)

    async def _watch_events(self) -> None:
        """A peer that comes back may have another network: try it again."""
        with self._host.events() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    self._backoff.succeeded(event.peer)

    async def _keep_spares(self) -> None:
        try:
            while True:
                await self._keep_spares_once()
        finally:
            # before the nursery closes: it takes no more tasks a moment before its
            # owner runs again, and a socket given to it then would be lost
            self._nursery = None

    async def _keep_spares_once(self) -> None:
        now = trio.current_time()
        self._close(self._spares.expire(now))
        self._close([n for n, s in self._sockets.items() if _is_dead(s)])
        for peer in self._spares.wanted(now):
            if self._backoff.due(peer) <= now and self._nursery is not None:
                self._spares.started(peer)
                self._nursery.start_soon(self._punch_spare, peer)
        self._wake = trio.Event()
        with trio.move_on_after(_SWEEP_SECONDS):
            await self._wake.wait()

    async def _punch_spare(self, peer: PeerId) -> None:
        try:
            sock = await self._punch_now(peer)
        except FabricError as exc:
            # whatever it was, the next sweep must not run into it at once
            if exc.code not in (FAILED, IMPOSSIBLE):
                self._backoff.failed(peer, trio.current_time(), exc.reason)
        else:
            self._shelve(peer, sock)
        finally:
            self._spares.ended(peer)

    def _shelve(self, peer: PeerId, sock: socket.socket) -> None:
        number = None
        if self._nursery is not None:
            number = self._spares.add(peer, trio.current_time())
        if number is None:
            sock.close()
        else:
            self._sockets[number] = sock

    def _take_spare(self, peer: PeerId) -> socket.socket | None:
        now = trio.current_time()
        while (number := self._spares.take(peer, now)) is not None:
            self._wake.set()
            sock = self._sockets.pop(number)
            if not _is_dead(sock):
                return sock
            sock.close()
        return None

    def _close(self, numbers: list[int]) -> None:
        for number in numbers:
            self._spares.drop(number)
            sock = self._sockets.pop(number, None)
            if sock is not None:
                sock.close()


def _is_dead(sock: socket.socket) -> bool:
    """Return whether a spare ended; its other end says nothing before its label."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
