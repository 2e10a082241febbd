"""The data plane's live sockets: paced, measured, watched, and cut when a gate changes.

A socket of this process is borrowed for an instant at each look, so that closing it
closes the connection. Of a socket that goes to a worker a copy is kept, which paces it
(the rate is the connection's, not the descriptor's) and shuts it down; the copy goes
when no process of ours holds another.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import msgspec
import trio

from fabric.core.ids import PeerId, short
from fabric.net.ack_watch import SILENT_SECONDS, AckWatch
from fabric.net.budget_config import BudgetConfig
from fabric.net.rate_book import RateBook, Use
from fabric.net.socket_holders import Holders
from fabric.net.socket_options import set_doubt, set_liveness
from fabric.net.tcp_info import TcpInfo, is_tcp, set_pacing, tcp_info

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Rates are split anew this often: a connection that starts waits no longer."""
HOLDER_SECONDS = 0.5
"""A killed worker's peers learn of it within this."""
TRAVEL_SECONDS = 10.0
"""A socket on its way to a worker is in nobody's table until the worker takes it."""
DOUBT_SECONDS = 8.0
"""For how long the sockets of a peer are watched sharply, those made meanwhile too."""
DOUBTED_SILENT_SECONDS = 2.0
"""Nothing acknowledged for so long is death when the path is in doubt."""
_SMOOTHING = 0.5
_SAME_RATE = 0.01
"""A change of less is not worth a system call."""


class PeerTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the data plane moves with one peer, smoothed over about a second.

    Attributes:
        up_bytes_per_second: Acknowledged by the peer.
        down_bytes_per_second: Received from it.
        connections: By kind: "direct", "punched", "relay". Bytes of relayed ones are
            not counted here: they pass through the relay's control connection.
    """

    up_bytes_per_second: float
    down_bytes_per_second: float
    connections: dict[str, int]


class SocketHandle:
    """One entry of the registry; made by :meth:`SocketRegistry.add`."""

    def __init__(
        self, registry: SocketRegistry, sock: socket.socket, peer: PeerId, kind: str
    ) -> None:
        self.peer = peer
        self.kind = kind
        self.inode = os.fstat(sock.fileno()).st_ino
        self.fileno = sock.fileno()
        self.copy: socket.socket | None = None
        self.watch = AckWatch()
        self.last: tuple[float, TcpInfo] | None = None
        self.up = 0.0
        self.down = 0.0
        self.paced: float = math.inf
        self.arrived = False
        self.shared_at: float | None = None
        self.doubted = False
        self._registry = registry

    def release(self) -> None:
        """Take the socket off the books; the connection is its holders' alone."""
        self._registry._forget(self)

    @contextmanager
    def borrowed(self) -> Iterator[socket.socket | None]:
        """Give the socket, or None when its holder closed it."""
        if self.copy is not None:
            yield self.copy
            return
        sock = None
        with suppress(OSError):
            # a thread may close the descriptor and another socket get its number
            sock = socket.socket(fileno=os.dup(self.fileno))
            if os.fstat(sock.fileno()).st_ino != self.inode:
                sock.close()
                sock = None
        try:
            yield sock
        finally:
            if sock is not None:
                sock.close()


class SocketRegistry:
    """All data-plane sockets by peer. Call from trio's thread only.

    Args:
        config: The budgets.
    """

    def __init__(self, config: BudgetConfig) -> None:
        self._book = RateBook(config)
        self._handles: dict[SocketHandle, None] = {}
        self._holders = Holders()
        self._next_count = 0.0
        self._doubted_until: dict[PeerId, float] = {}

    @property
    def config(self) -> BudgetConfig:
        """The budgets; assign to change them, from the next look on."""
        return self._book.config

    @config.setter
    def config(self, config: BudgetConfig) -> None:
        self._book.config = config

    def check(self, peer: PeerId) -> None:
        """Refuse a connection more with ``peer``, before it is made.

        Raises:
            ResourceExhausted: E_BUDGET.
        """
        self._book.check(peer)

    def add(
        self, sock: socket.socket, peer: PeerId, kind: str, *, leaves: bool = False
    ) -> SocketHandle:
        """Enter a connected socket; it stays the caller's.

        Args:
            sock: Of this process, by its descriptor until it is closed.
            peer: Who is at the other end.
            kind: "direct", "punched" or "relay".
            leaves: It will be handed to another process: a copy is kept.

        Raises:
            ResourceExhausted: E_BUDGET; the caller closes ``sock``.
        """
        self._book.check(peer)
        set_liveness(sock, patient=True)  # looked at here, whoever made it
        handle = SocketHandle(self, sock, peer, kind)
        if leaves:
            handle.copy = sock.dup()
        self._handles[handle] = None
        self._watch(handle, sock)
        self._book.add(handle, peer)
        self._pace(handle, self._first_rate())
        return handle

    def shut_down(self, peer: PeerId) -> int:
        """Cut every connection with ``peer``, workers' too; return how many."""
        cut = 0
        for handle in [h for h in self._handles if h.peer == peer]:
            with handle.borrowed() as sock:
                if sock is not None:
                    cut += 1
                    _cut(sock)
            self._forget(handle)
        return cut

    def shut_down_from(self, ips: Collection[str]) -> int:
        """Cut every connection that left from one of ``ips``; return how many.

        Those addresses are no longer ours: nothing that is sent there arrives.
        """
        cut = 0
        for handle in list(self._handles):
            with handle.borrowed() as sock:
                if sock is None or not is_tcp(sock) or _local_ip(sock) not in ips:
                    continue
                cut += 1
                _cut(sock)
            self._forget(handle)
        return cut

    def doubt(self, peer: PeerId, now: float) -> None:
        """Find out soon which sockets with ``peer`` are dead: the path may be.

        The kernels tell: a peer that is slow or stopped still acknowledges.
        """
        self._doubted_until[peer] = now + DOUBT_SECONDS
        for handle in [h for h in self._handles if h.peer == peer]:
            with handle.borrowed() as sock:
                if sock is not None:
                    self._watch(handle, sock)

    def traffic(self) -> dict[PeerId, PeerTraffic]:
        """Return what each connected peer moves."""
        result: dict[PeerId, PeerTraffic] = {}
        for handle in self._handles:
            so_far = result.get(handle.peer)
            kinds = dict(so_far.connections) if so_far else {}
            kinds[handle.kind] = kinds.get(handle.kind, 0) + 1
            result[handle.peer] = PeerTraffic(
                up_bytes_per_second=handle.up
                + (so_far.up_bytes_per_second if so_far else 0.0),
                down_bytes_per_second=handle.down
                + (so_far.down_bytes_per_second if so_far else 0.0),
                connections=kinds,
            )
        return result

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Look at the sockets until cancelled; then lift nothing, hold nothing."""
        try:
            task_status.started()
            while True:
                await trio.sleep(LOOK_SECONDS)
                self.look(trio.current_time())
        finally:
            for handle in list(self._handles):
                self._forget(handle)

    def look(self, now: float) -> None:
        """Measure every socket, drop those that are gone, and set the rates."""
        for peer in [p for p, until in self._doubted_until.items() if until <= now]:
            del self._doubted_until[peer]
        for handle in list(self._handles):
            with handle.borrowed() as sock:
                if sock is None or not self._measured(handle, sock, now):
                    self._forget(handle)
        if now >= self._next_count:
            self._next_count = now + HOLDER_SECONDS
            self._drop_copies_nobody_shares(now)
        for key, rate in self._book.rates().items():
            if isinstance(key, SocketHandle):
                self._pace(key, rate)

    def _measured(self, handle: SocketHandle, sock: socket.socket, now: float) -> bool:
        """Note what the socket did; return whether it is open."""
        if not is_tcp(sock):
            return True
        info = tcp_info(sock)
        if info.closed:
            return handle.copy is None  # ours to keep on the books until it is closed
        self._watch(handle, sock)
        limit = DOUBTED_SILENT_SECONDS if handle.doubted else SILENT_SECONDS
        if handle.watch.dead(info, now, limit):
            logger.info("data.silent peer=%s kind=%s", short(handle.peer), handle.kind)
            _cut(sock)
            return False
        before = handle.last
        if before is None or now <= before[0]:
            handle.last = before or (now, info)
            return True
        seconds = now - before[0]
        up = (info.bytes_acked - before[1].bytes_acked) / seconds
        down = (info.bytes_received - before[1].bytes_received) / seconds
        handle.up += _SMOOTHING * (up - handle.up)
        handle.down += _SMOOTHING * (down - handle.down)
        handle.last = (now, info)
        self._book.report(handle, Use(max(up, handle.up), info.notsent_bytes > 0))
        return True

    def _watch(self, handle: SocketHandle, sock: socket.socket) -> None:
        """Ask sharply while the peer is in doubt, as usual otherwise."""
        doubted = handle.peer in self._doubted_until
        if doubted != handle.doubted and is_tcp(sock):
            handle.doubted = doubted
            set_doubt(sock, doubted=doubted)

    def _drop_copies_nobody_shares(self, now: float) -> None:
        kept = [handle for handle in self._handles if handle.copy is not None]
        counts = self._holders.count() if kept else None
        if counts is None:
            return
        for handle in kept:
            handle.arrived |= counts.children[handle.inode] > 0
            held = counts.children[handle.inode] + counts.own[handle.inode]
            if held > 1 or handle.shared_at is None:  # one is the copy itself
                handle.shared_at = now
            elif handle.arrived or now - handle.shared_at >= TRAVEL_SECONDS:
                self._forget(handle)

    def _first_rate(self) -> float:
        """Return a share for a new socket until the next look splits anew."""
        config = self.config
        total = config.max_up_bytes_per_second or math.inf
        each = config.max_up_bytes_per_second_per_peer or math.inf
        return min(total, each) / len(self._handles)

    def _pace(self, handle: SocketHandle, rate: float) -> None:
        same = math.isfinite(rate) and abs(rate - handle.paced) <= _SAME_RATE * rate
        if same or rate == handle.paced:
            return
        handle.paced = rate
        with handle.borrowed() as sock:
            if sock is not None:
                set_pacing(sock, rate if math.isfinite(rate) else None)

    def _forget(self, handle: SocketHandle) -> None:
        self._handles.pop(handle, None)
        self._book.remove(handle)
        if handle.copy is not None:
            handle.copy.close()


def _local_ip(sock: socket.socket) -> str:
    try:
        return str(sock.getsockname()[0])
    except OSError:  # the peer reset it
        return ""


def _cut(sock: socket.socket) -> None:
    with suppress(OSError):  # the peer may have closed it first
        sock.shutdown(socket.SHUT_RDWR)
