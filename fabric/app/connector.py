"""Keep live connections with the members: the shell of the peer book."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Protocol

import trio

from fabric.app.peer_book import PeerBook
from fabric.core.errors import FabricError, PeerTimeout, RemoteRefused
from fabric.core.ids import PeerId, short
from fabric.net.data_plane import DataPlane
from fabric.net.host import Host
from fabric.net.ports import PathKind

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""How soon a new member or a lost connection is noticed."""


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

    def __init__(self, host: Host, plane: DataPlane, book: PeerBook) -> None:
        self._host = host
        self._plane = plane
        self._book = book

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
            await self._host.connect(peer, contact.addrs)
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
    ) -> None:
        self._host = host
        self._admission = admission
        self._book = book
        self._members = members
        self._ready = ready
        self._greet = greet
        self._blocked = blocked
        self._timeout = timeout_seconds

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep connecting until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._book.learn(self._members())
                settled = self._ready() | self._blocked()
                for peer in self._book.due(trio.current_time(), settled):
                    # bounded by the book's max_dials
                    nursery.start_soon(self._meet, peer)
                await trio.sleep(TICK_SECONDS)

    async def _meet(self, peer: PeerId) -> None:
        """Dial and attest; the book learns how it went."""
        try:
            with trio.fail_after(self._timeout):
                await self.meet(peer, self._book.contacts[peer].addrs)
        except trio.TooSlowError:
            error: FabricError = PeerTimeout(
                f"no answer within {self._timeout:g} s",
                next_step=f"see `fabric why {short(peer)}`",
            )
            self._book.on_failure(peer, error, trio.current_time())
        except FabricError as exc:
            if exc.code != self._last_code(peer):
                log.info("meet.failed peer=%s code=%s", short(peer), exc.code)
            self._book.on_failure(peer, exc, trio.current_time())
        else:
            self._book.on_success(peer)

    async def meet(self, peer: PeerId, addrs: Iterable[str]) -> None:
        """Have connections with ``peer`` and be admitted both ways.

        Raises:
            FabricError: why not.
        """
        if peer not in self._host.connected():
            await self._host.connect(peer, tuple(addrs))
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
