"""Keep live connections with the members: the shell of the peer book."""

from __future__ import annotations

import logging
import time
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from typing import Protocol

import trio

from fabric.app.known_addrs import answered
from fabric.app.peer_book import PeerBook
from fabric.core.errors import FabricError, PeerTimeout, RemoteRefused
from fabric.core.ids import PeerId, short
from fabric.net.data_plane import DataPlane
from fabric.net.host import Host
from fabric.net.ports import PathKind
from fabric.net.traversal_api import ConnectionInfo

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""How soon a new member or a lost connection is noticed."""

Rank = Callable[[PeerId, Sequence[str]], Sequence[str]]
"""Returns those of a peer's multiaddrs worth a dial from where we are, best first."""
Connections = Callable[[PeerId], Sequence[ConnectionInfo]]
"""Returns the live control connections with a peer."""


def as_known(peer: PeerId, addrs: Sequence[str]) -> Sequence[str]:
    """Return ``addrs`` in the order of the peer book."""
    return addrs


def no_connections(peer: PeerId) -> Sequence[ConnectionInfo]:
    """Return none: for a host that does not tell which address answered."""
    return ()


class Admission(Protocol):
    """Attests with a connected peer."""

    async def seek(self, peer: PeerId) -> object:
        """Be admitted by ``peer`` and appraise it."""
        ...

    async def ensure(self, peer: PeerId) -> None:
        """Trust ``peer``: as :meth:`seek`, unless we do already."""
        ...


class RedialingConnector:
    """Makes RPC streams; dials the peer first when no control connection is left.

    A machine that is up with nobody listening refuses at once (NoRoute), which is how a
    killed process differs from one that is cut off or slow.
    """

    def __init__(
        self, host: Host, plane: DataPlane, book: PeerBook, rank: Rank = as_known
    ) -> None:
        self._host = host
        self._plane = plane
        self._book = book
        self._rank = rank

    async def connect(
        self, peer: PeerId, kinds: Collection[PathKind]
    ) -> tuple[trio.abc.Stream, PathKind]:
        """Return an authenticated stream to ``peer`` on a path of ``kinds``.

        Raises:
            Unavailable: no path; NoRoute when every address refused.
            RemoteRefused: the peer's gate refuses us.
        """
        contact = self._book.contacts.get(peer)
        if contact is not None and peer not in self._host.connected():
            await self._host.connect(peer, ranked(self._rank, peer, contact.addrs))
        return await self._plane.connect(peer, kinds)


class MemberConnector:
    """Dials the members that are missing and attests with those connected.

    Args:
        host: Dials.
        admission: Attests.
        book: Whom to dial, when; owned by this service.
        members: Addresses of the current members.
        ready: Peers with all they need: a live RPC connection.
        greet: Brings that connection up.
        blocked: Peers that must not be dialled.
        timeout_seconds: One dial and admission.
        rank: Which addresses to dial first.
        connections: Tells which address answered.
    """

    def __init__(
        self,
        host: Host,
        admission: Admission,
        book: PeerBook,
        members: Callable[[], Mapping[PeerId, Iterable[str]]],
        ready: Callable[[], frozenset[PeerId]],
        greet: Callable[[PeerId], Awaitable[object]],
        blocked: Callable[[], frozenset[PeerId]],
        *,
        timeout_seconds: float,
        rank: Rank = as_known,
        connections: Connections = no_connections,
    ) -> None:
        self._host = host
        self._admission = admission
        self._book = book
        self._members = members
        self._ready = ready
        self._greet = greet
        self._blocked = blocked
        self._timeout = timeout_seconds
        self._rank = rank
        self._connections = connections
        self._wake = trio.Event()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep connecting until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._book.learn(self._members(), source="record", wall=time.time())
                settled = self._ready() | self._blocked()
                for peer in self._book.due(trio.current_time(), settled):
                    # bounded by the book's max_dials
                    nursery.start_soon(self._meet, peer)
                with trio.move_on_after(TICK_SECONDS):
                    await self._wake.wait()
                self._wake = trio.Event()

    def retry_now(self) -> None:
        """Dial everybody who is missing at once: our network changed."""
        self._book.retry_now()
        self._wake.set()

    async def _meet(self, peer: PeerId) -> None:
        """Dial and attest; the book learns how it went."""
        addrs = self._book.contacts[peer].addrs
        dialled = peer not in self._host.connected()
        try:
            with trio.fail_after(self._timeout):
                await self.meet(peer, addrs)
        except trio.TooSlowError:
            error: FabricError = PeerTimeout(
                f"no answer within {self._timeout:g} s",
                next_step=f"see `fabric why {short(peer)}`",
            )
            self._note_failure(peer, error, addrs if dialled else ())
        except FabricError as exc:
            if exc.code != self._last_code(peer):
                log.info(
                    "meet.failed peer=%s code=%s reason=%s",
                    short(peer),
                    exc.code,
                    exc.reason,
                )
            self._note_failure(peer, exc, addrs if dialled else ())
        else:
            worked = answered(addrs, self._connections(peer)) if dialled else ()
            self._book.on_success(peer, worked, wall=time.time())

    def _note_failure(
        self, peer: PeerId, error: FabricError, dialled: Sequence[str]
    ) -> None:
        # connected but not admitted: the addresses did nothing wrong
        failed = () if peer in self._host.connected() else dialled
        self._book.on_failure(peer, error, trio.current_time(), failed)

    async def meet(self, peer: PeerId, addrs: Iterable[str]) -> None:
        """Have connections with ``peer`` and be admitted both ways.

        Raises:
            FabricError: why not.
        """
        if peer not in self._host.connected():
            await self._host.connect(peer, ranked(self._rank, peer, tuple(addrs)))
        await self._admission.ensure(peer)
        try:
            await self._greet(peer)
        except RemoteRefused:
            # we trust it, but it does not know us, or not any more: it says why
            await self._admission.seek(peer)
            await self._greet(peer)

    def _last_code(self, peer: PeerId) -> str:
        contact = self._book.contacts.get(peer)
        return contact.last_error.code if contact and contact.last_error else ""


def ranked(rank: Rank, peer: PeerId, addrs: Sequence[str]) -> Sequence[str]:
    """Return what ``rank`` makes of ``addrs``; all of them if it finds none good.

    A wrong guess about another site's addresses must not make a peer unreachable, and
    what stands behind a relay has no place to judge.
    """
    good = tuple(rank(peer, addrs))
    circuits = [a for a in addrs if "/p2p-circuit" in a and a not in good]
    return (*good, *circuits) or tuple(addrs)
