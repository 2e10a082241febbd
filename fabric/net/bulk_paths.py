"""Bulk connections between daemons: blocking TLS sockets, each served by a thread.

A thread cannot be cancelled, so its connection is: the service keeps a duplicate of
each descriptor, and shutting that down ends the thread's next read or write.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar

import trio

from fabric.bulk.certificates import Credentials, check_identity_certificate_untrusted
from fabric.bulk.tls import handshake
from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import BUGS, Counters
from fabric.net.data_config import DataConfig
from fabric.net.data_plane import DataPlane
from fabric.net.offers import ForBulk, Offer, OfferRequest
from fabric.net.paths_api import BulkHandler, BulkSocket
from fabric.net.ports import PathKind
from fabric.net.tasks import collapse_group

logger = logging.getLogger(__name__)
T = TypeVar("T")


@asynccontextmanager
async def open_bulk_paths(plane: DataPlane) -> AsyncIterator[BulkService]:
    """Serve and dial bulk connections; leaving shuts every inbound one down."""
    service = BulkService(plane)
    with collapse_group():
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            yield service
            nursery.cancel_scope.cancel()


class BulkService:
    """Implements ``paths_api.BulkPaths``; made by :func:`open_bulk_paths`."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._config: DataConfig = plane.config
        self._counters: Counters = plane.counters
        self._handlers: dict[str, BulkHandler] = {}
        self._limiter = trio.CapacityLimiter(self._config.max_bulk_connections)
        self._dialling = trio.CapacityLimiter(self._config.max_bulk_connections)
        self._live: defaultdict[PeerId, set[socket.socket]] = defaultdict(set)
        self._nursery: trio.Nursery | None = None
        plane.serve(ForBulk, self)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Own the tasks of connections to ourselves until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # what still arrives is refused: the nursery is about to take no more
                self._nursery = None

    def serve_bulk(self, service: str, handler: BulkHandler) -> None:
        """Run ``handler`` in a thread for each inbound connection to ``service``.

        The socket is closed when it returns. At most ``config.max_bulk_connections``
        run at once; more are refused with E_BUSY.
        """
        if service in self._handlers:
            raise LocalProtocolError(f"bulk service {service!r} has a handler already")
        self._handlers[service] = handler

    async def dial_bulk(self, peer: PeerId, service: str) -> BulkSocket:
        """Return a connected, authenticated socket to ``peer``'s ``service``.

        Calls on it block, so use it in a thread; a stall above
        ``config.bulk_stall_seconds`` is a TimeoutError. Our own id gives a socket pair.

        Raises:
            Unavailable: no path, or the peer does not serve it.
            RemoteRefused: the peer's gate refuses us.
            IntegrityError: what answers is not ``peer``.
        """
        if peer == self._plane.peer_id:
            return self._dial_ourselves(service)
        ours = self._plane.identity()
        sock, granted, _ = await self._plane.dial(peer, ForBulk(service), ours.der)
        with _closed_on_error(sock):
            check_identity_certificate_untrusted(granted.certificate, peer, time.time())
            return await self._in_thread(
                sock,
                lambda: self._secure(sock, ours, granted.certificate, server=False),
                self._dialling,
            )

    def admit_untrusted(
        self, peer: PeerId, request: OfferRequest, now: float
    ) -> tuple[bytes, Credentials | None]:
        """Return our identity certificate if the service exists and has room."""
        check_identity_certificate_untrusted(request.certificate, peer, now)
        self._handler_of(_service_of(request))
        ours = self._plane.identity()
        return ours.der, ours

    async def take(self, offer: Offer, sock: socket.socket, kind: PathKind) -> None:
        """Authenticate and serve one connection, in a thread."""
        ours = offer.ours
        with _closed_on_error(sock):
            handler = self._handler_of(_service_of(offer))
            if ours is None:
                raise LocalProtocolError("bulk offer without credentials")

        def serve() -> None:
            tls = self._secure(sock, ours, offer.peer_certificate, server=True)
            with tls:
                handler(tls, offer.peer)

        await self._serve(sock, offer.peer, serve)

    async def disconnect(self, peer: PeerId) -> None:
        """Shut the inbound connections of ``peer`` down: its gate decision changed."""
        for handle in self._live.get(peer, set()):
            _shut_down(handle)
        await trio.lowlevel.checkpoint()

    def _dial_ourselves(self, service: str) -> BulkSocket:
        handler = self._handler_of(service)
        if self._nursery is None:
            raise LocalProtocolError("the bulk service does not run")
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.settimeout(self._config.bulk_stall_seconds)

        def serve() -> None:
            with theirs:
                handler(theirs, self._plane.peer_id)

        self._nursery.start_soon(self._serve, theirs, self._plane.peer_id, serve)
        return ours

    def _handler_of(self, service: str) -> BulkHandler:
        handler = self._handlers.get(service)
        if handler is None:
            raise Unavailable(f"no bulk service {service!r}", code="E_NO_SERVICE")
        if self._limiter.available_tokens <= 0:
            raise ResourceExhausted(
                f"{self._config.max_bulk_connections} bulk connections are open",
                code="E_BUSY",
                next_step="retry later",
            )
        return handler

    def _secure(
        self, sock: socket.socket, ours: Credentials, peer_der: bytes, *, server: bool
    ) -> socket.socket:
        timeout = self._config.handshake_timeout_seconds
        tls = handshake(sock, ours, peer_der, server=server, timeout_seconds=timeout)
        tls.settimeout(self._config.bulk_stall_seconds)
        return tls

    async def _serve(
        self, sock: socket.socket, peer: PeerId, serve: Callable[[], None]
    ) -> None:
        """Run ``serve`` in a thread; like RPC's, this boundary catches everything."""
        try:
            await self._in_thread(sock, serve, self._limiter, peer)
        except (FabricError, OSError) as exc:
            logger.info("bulk.ended peer=%s reason=%s", short(peer), exc)
        except Exception:
            self._counters.add(BUGS)
            logger.exception("bulk.bug peer=%s", short(peer))
            if self._config.rpc.raise_bugs:
                raise
        finally:
            sock.close()  # a socket that became TLS is detached: then this does nothing

    async def _in_thread(
        self,
        sock: socket.socket,
        work: Callable[[], T],
        limiter: trio.CapacityLimiter,
        peer: PeerId | None = None,
    ) -> T:
        """Run ``work`` on ``sock``; cancellation shuts the connection down."""
        handle = sock.dup()
        if peer is not None:
            self._live[peer].add(handle)
        done = False
        try:
            result = await trio.to_thread.run_sync(
                work, abandon_on_cancel=True, limiter=limiter
            )
            done = True
        finally:
            if not done:
                _shut_down(handle)
            handle.close()
            if peer is not None:
                self._live[peer].discard(handle)
                if not self._live[peer]:
                    del self._live[peer]
        return result


def _service_of(holder: OfferRequest | Offer) -> str:
    if not isinstance(holder.purpose, ForBulk):
        raise LocalProtocolError("offer of another purpose")
    return holder.purpose.service


def _shut_down(handle: socket.socket) -> None:
    with suppress(OSError):  # the peer may have closed it first
        handle.shutdown(socket.SHUT_RDWR)


@contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise
