"""Sockets for workers: the daemon finds the path, the worker speaks TLS on it.

Two workers of one daemon get a socket pair without TLS ("local"). To another daemon the
data plane opens what it can: TCP to an address that it offers ("direct"), a punched TCP
connection ("punched"), or a socket pair that is pumped to a relay ("relay").
"""

from __future__ import annotations

import socket
import time
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress

import trio

from fabric.bulk.certificates import Credentials, check_job_certificate_untrusted
from fabric.core.errors import (
    LocalProtocolError,
    RemoteRefused,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId
from fabric.net.data_plane import DataPlane
from fabric.net.offers import ForJob, Offer, OfferRequest
from fabric.net.paths_api import Purpose, WorkerSocket
from fabric.net.ports import ALL_PATHS, PathKind

MAX_WAITING_SOCKETS = 64
"""Inbound sockets of one job that its worker has not taken yet."""
MAX_KNOWN_KINDS = 1024
"""Peers whose last path kind is remembered for status."""


class WorkerPaths:
    """Implements ``paths_api.Paths``."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._expected: dict[str, ExpectedSockets] = {}
        self._kinds: OrderedDict[PeerId, str] = OrderedDict()
        plane.serve(ForJob, self)

    async def open(
        self,
        peer: PeerId,
        purpose: Purpose,
        certificate: bytes,
        kinds: Collection[PathKind] = ALL_PATHS,
    ) -> WorkerSocket:
        """Return a connected socket to ``peer``'s worker of ``purpose.job``.

        Bound it with ``trio.fail_after`` at the call site.

        Args:
            peer: The other daemon; our own id gives a socketpair.
            purpose: Names job, generation and channel.
            certificate: DER job certificate of our worker, shown in the offer.
            kinds: The kinds of path that are wanted.

        Raises:
            Unavailable: no path, or the other side has no such worker (yet).
            RemoteRefused: the other side's gate or job refuses us.
            IntegrityError: the other side showed a wrong certificate.
        """
        if peer == self._plane.peer_id:
            return self._open_local(purpose)
        wanted = ForJob(purpose.job, purpose.counter, purpose.channel)
        sock, granted, kind = await self._plane.dial(peer, wanted, certificate, kinds)
        try:
            check_job_certificate_untrusted(
                granted.certificate, peer, purpose.job, time.time()
            )
        except BaseException:
            sock.close()
            raise
        self._remember(peer, kind)
        sock.setblocking(True)
        return WorkerSocket(sock, peer, granted.certificate, True, purpose, kind)

    def expect(
        self, job: str, certificate: bytes, peers: frozenset[PeerId]
    ) -> ExpectedSockets:
        """Accept connections for ``job`` from ``peers`` until the result is closed."""
        if job in self._expected:
            raise LocalProtocolError(f"job {job} is expected already")
        expected = ExpectedSockets(self, job, certificate, peers)
        self._expected[job] = expected
        return expected

    def kind(self, peer: PeerId) -> str | None:
        """Return the kind of the last path opened with ``peer``, or None."""
        return self._kinds.get(peer)

    def admit_untrusted(
        self, peer: PeerId, request: OfferRequest, now: float
    ) -> tuple[bytes, Credentials | None]:
        """Return our worker's certificate if it expects this peer and generation."""
        purpose = _purpose_of(request)
        expected = self._expecting(purpose.job)
        expected.check(peer, purpose.counter)
        check_job_certificate_untrusted(request.certificate, peer, purpose.job, now)
        return expected.certificate, None

    async def take(self, offer: Offer, sock: socket.socket, kind: PathKind) -> None:
        """Queue the socket for the worker; what changed since the offer counts."""
        purpose = _purpose_of(offer)
        try:
            expected = self._expecting(purpose.job)
            expected.check(offer.peer, purpose.counter)
            sock.setblocking(True)
            expected.put(
                WorkerSocket(
                    sock, offer.peer, offer.peer_certificate, False, purpose, kind
                )
            )
        except BaseException:
            sock.close()
            raise
        self._remember(offer.peer, kind)
        await trio.lowlevel.checkpoint()

    def _open_local(self, purpose: Purpose) -> WorkerSocket:
        peer = self._plane.peer_id
        expected = self._expecting(purpose.job)
        expected.check(peer, purpose.counter)
        ours, theirs = socket.socketpair()
        try:
            expected.put(WorkerSocket(theirs, peer, b"", False, purpose, "local"))
        except BaseException:
            ours.close()
            theirs.close()
            raise
        self._remember(peer, "local")
        return WorkerSocket(ours, peer, b"", True, purpose, "local")

    def _expecting(self, job: str) -> ExpectedSockets:
        expected = self._expected.get(job)
        if expected is None:
            raise Unavailable(f"no worker of job {job} here", code="E_NO_WORKER")
        return expected

    def _remember(self, peer: PeerId, kind: str) -> None:
        self._kinds[peer] = kind
        self._kinds.move_to_end(peer)
        if len(self._kinds) > MAX_KNOWN_KINDS:
            self._kinds.popitem(last=False)

    def _forget(self, job: str) -> None:
        self._expected.pop(job, None)


class ExpectedSockets:
    """Implements ``paths_api.WorkerSockets``; made by :meth:`WorkerPaths.expect`."""

    def __init__(
        self,
        paths: WorkerPaths,
        job: str,
        certificate: bytes,
        peers: frozenset[PeerId],
    ) -> None:
        self.certificate = certificate
        self._paths = paths
        self._job = job
        self._peers = peers
        self._min_counter = 0
        self._closed = False
        self._put, self._take = trio.open_memory_channel[WorkerSocket](
            MAX_WAITING_SOCKETS
        )

    async def accept(self) -> WorkerSocket:
        """Return the next inbound socket; waits for ever, so bound it.

        Raises:
            Unavailable: closed.
        """
        try:
            while True:
                waiting = await self._take.receive()
                if self._allowed(waiting.peer, waiting.purpose.counter):
                    return waiting
                hang_up(waiting.sock)  # queued before ``allow`` excluded it
        except (trio.EndOfChannel, trio.ClosedResourceError) as exc:
            raise Unavailable(f"job {self._job} is no longer expected") from exc

    def allow(self, peers: frozenset[PeerId], *, min_counter: int) -> None:
        """Accept from ``peers`` only, for generations of at least ``min_counter``."""
        self._peers = peers
        self._min_counter = min_counter

    def renew(self, certificate: bytes) -> None:
        """Show ``certificate`` from now on."""
        self.certificate = certificate

    def close(self) -> None:
        """Refuse further connections and close those not yet accepted."""
        if self._closed:
            return
        self._closed = True
        self._paths._forget(self._job)
        while True:
            try:
                hang_up(self._take.receive_nowait().sock)
            except (trio.WouldBlock, trio.EndOfChannel):
                break
        self._put.close()

    def check(self, peer: PeerId, counter: int) -> None:
        """Refuse a peer or a generation that is not expected.

        Raises:
            RemoteRefused: for the dialler: E_NOT_PARTICIPANT or E_STALE_GENERATION.
        """
        if peer not in self._peers:
            raise RemoteRefused(
                "this peer does not take part in the job's generation",
                code="E_NOT_PARTICIPANT",
            )
        if counter < self._min_counter:
            raise RemoteRefused(
                f"generation {counter} is older than {self._min_counter}",
                code="E_STALE_GENERATION",
            )

    def put(self, waiting: WorkerSocket) -> None:
        """Queue an inbound socket.

        Raises:
            ResourceExhausted: the worker does not take its sockets.
        """
        try:
            self._put.send_nowait(waiting)
        except trio.WouldBlock as exc:
            raise ResourceExhausted(
                f"{MAX_WAITING_SOCKETS} sockets wait for this worker", code="E_BUSY"
            ) from exc

    def _allowed(self, peer: PeerId, counter: int) -> bool:
        return peer in self._peers and counter >= self._min_counter


def hang_up(sock: socket.socket) -> None:
    """End the connection now, although the socket registry holds a copy of it."""
    with suppress(OSError):  # the peer may have closed it first
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _purpose_of(holder: OfferRequest | Offer) -> Purpose:
    if not isinstance(holder.purpose, ForJob):
        raise LocalProtocolError("offer of another purpose")
    wanted = holder.purpose
    return Purpose(wanted.job, wanted.counter, wanted.channel)
