"""Give a relayed control connection the path that the data plane found.

Data-plane sockets leave from ports of their own, each with a mapping that was just
learnt, and reach public listeners; so they cross where DCUtR's, all from the control
port, do not. The control connection then need not stay on a relay, and end with it: one
more socket is opened as for RPC, and the host runs its security and muxer on it.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Collection

import trio

from fabric.bulk.certificates import Credentials
from fabric.core.errors import FabricError, NoRoute, Unavailable
from fabric.core.ids import PeerId, short
from fabric.net.data_plane import DataPlane
from fabric.net.offers import ForControl, Offer, OfferRequest, format_address
from fabric.net.ports import BETTER_THAN_RELAY, PathKind
from fabric.net.socket_options import set_liveness
from fabric.net.traversal_api import ConnectionInfo, TraversalHost
from nat.punch.backoff import Backoff
from nat.punch.config import PunchConfig

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
MOVE_SECONDS = 10.0


class ControlPathService:
    """Run :meth:`run` in a task.

    Args:
        host: Has the control connections.
        plane: Opens the sockets, and accepts those of others.
        config: Waits between failures.
        direct: Peers whose RPC needs no relay.
    """

    def __init__(
        self,
        host: TraversalHost,
        plane: DataPlane,
        config: PunchConfig,
        direct: Callable[[], Collection[PeerId]],
    ) -> None:
        self._host = host
        self._plane = plane
        self._direct = direct
        self._backoff = Backoff(config.retry_seconds)
        plane.serve(ForControl, self)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Move control connections until cancelled, one at a time."""
        task_status.started()
        while True:
            now = trio.current_time()
            for peer in sorted(self._direct()):
                if self._wants(peer) and self._backoff.due(peer) <= now:
                    await self._move(peer)
            await trio.sleep(CHECK_SECONDS)

    def network_changed(self) -> None:
        """Try everyone again."""
        self._backoff.network_changed()

    def _wants(self, peer: PeerId) -> bool:
        """Return whether only relays carry our streams, and it is our turn to act."""
        found = self._host.connections(peer)
        relayed = bool(found) and all(info.kind == "relay" for info in found)
        return relayed and self._host.peer_id < peer

    async def _move(self, peer: PeerId) -> None:
        try:
            with trio.fail_after(MOVE_SECONDS):
                sock, _, kind = await self._plane.dial(
                    peer, ForControl(), b"", BETTER_THAN_RELAY
                )
                await self._adopt(peer, sock, kind, outbound=True)
        except (FabricError, trio.TooSlowError) as exc:
            reason = getattr(exc, "reason", "") or "it took too long"
            self._backoff.failed(peer, trio.current_time(), reason)
            logger.info("control.stays peer=%s reason=%s", short(peer), reason)
        else:
            self._backoff.succeeded(peer)
            logger.info("control.moved peer=%s kind=%s", short(peer), kind)

    async def _adopt(
        self, peer: PeerId, sock: socket.socket, kind: PathKind, *, outbound: bool
    ) -> None:
        try:
            set_liveness(sock)
            info = ConnectionInfo(
                kind=kind,
                outbound=outbound,
                local=format_address(*sock.getsockname()[:2]),
                remote=format_address(*sock.getpeername()[:2]),
            )
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        except OSError as exc:
            sock.close()
            raise Unavailable(f"connection broke: {exc}") from exc
        await self._host.adopt(peer, stream, info)

    # what the data plane asks: Acceptor

    def admit_untrusted(
        self, peer: PeerId, request: OfferRequest, now: float
    ) -> tuple[bytes, Credentials | None]:
        """Return no certificate: the host's own handshake follows."""
        return b"", None

    async def take(self, offer: Offer, sock: socket.socket, kind: PathKind) -> None:
        """Give ``sock`` to the host as a connection with the peer of ``offer``."""
        if kind == "relay":
            sock.close()
            raise NoRoute("a relay carries control connections without the data plane")
        await self._adopt(offer.peer, sock, kind, outbound=False)
