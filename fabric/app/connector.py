"""Connect with members: the neighbours at once and for long, others on demand.

The shell of the peer book. Whoever is called without a connection is dialled first; so
every member can be called, and what asks for it need not know who is connected.
"""

from __future__ import annotations

import logging
import time
from collections.abc import (
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from typing import Protocol

import trio

from fabric.app.known_addrs import answered
from fabric.app.peer_book import PeerBook
from fabric.core.errors import FabricError, PeerTimeout, RemoteRefused, Unavailable
from fabric.core.ids import PeerId, short
from fabric.net.host import Host
from fabric.net.ports import ALLOWED, Decision
from fabric.net.traversal_api import ConnectionInfo

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""How soon a new member or a lost connection is noticed."""

SEEK_SECONDS = 10.0
"""A peer that refuses us although we trust it is asked again after this."""

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


class MemberConnector:
    """Dials the neighbours that are missing and attests with those connected.

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
        chosen: With whom to be connected for long; None: with everybody.
        permit: Whether a peer may be met at all.
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
        chosen: Callable[[], frozenset[PeerId] | None] = lambda: None,
        permit: Callable[[PeerId], Decision] = lambda peer: ALLOWED,
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
        self._chosen = chosen
        self._permit = permit
        self._learnt: Mapping[PeerId, Iterable[str]] | None = None
        self._dials: dict[PeerId, trio.Lock] = {}
        self._sought: dict[PeerId, float] = {}
        self._wake = trio.Event()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep connecting until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._learn()
                ready = self._ready()
                self._book.returned(ready)
                settled = ready | self._blocked()
                for peer in self._book.due(trio.current_time(), settled):
                    # bounded by the book's max_dials
                    nursery.start_soon(self._meet, peer)
                with trio.move_on_after(TICK_SECONDS):
                    await self._wake.wait()
                self._wake = trio.Event()

    def _learn(self) -> None:
        """Give the book what changed; of a large mesh, not more than it is to dial."""
        members, chosen = self._members(), self._chosen()
        if members is self._learnt and chosen == self._book.chosen:
            return
        self._learnt, self._book.chosen = members, chosen
        if chosen is not None:
            held = chosen | self._book.contacts.keys()
            members = {peer: members[peer] for peer in held if peer in members}
        self._book.learn(members, source="record", wall=time.time())

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
        await self._dial(peer, tuple(addrs))
        await self._admission.ensure(peer)
        try:
            await self._greet(peer)
        except RemoteRefused:
            # we trust it, but it does not know us, or not any more: it says why
            await self._admission.seek(peer)
            await self._greet(peer)

    async def reach(self, peer: PeerId) -> None:
        """Have a control connection with ``peer`` and trust it: it is needed now.

        A machine that is up with nobody listening refuses at once (NoRoute), which is
        how a killed process differs from one that is cut off or slow.

        Raises:
            Unavailable: it is not reached, or not to be met.
            RemoteRefused: it refuses us.
        """
        decision = self._permit(peer)
        if not decision.allowed:
            raise Unavailable(
                decision.reason, code=decision.code, next_step=decision.next_step
            )
        if peer not in self._host.connected():
            await self._reach_anew(peer)
        await self._admission.ensure(peer)

    async def _reach_anew(self, peer: PeerId) -> None:
        contact = self._book.contacts.get(peer)
        addrs = self._book.addrs_of(peer) or tuple(self._members().get(peer, ()))
        try:
            await self._dial(peer, addrs)
        except FabricError as exc:
            if contact is not None and not contact.dialling:
                self._note_failure(peer, exc, addrs)
            raise
        self._book.on_success(
            peer, answered(addrs, self._connections(peer)), wall=time.time()
        )

    async def open_stream(self, peer: PeerId, protocol: str) -> trio.abc.Stream:
        """Open a stream with any member, as ``Host.open_stream`` does when connected.

        Raises:
            Unavailable: it is not reached, or the connection broke.
            RemoteRefused: it does not serve ``protocol`` to us.
        """
        await self.reach(peer)
        try:
            return await self._host.open_stream(peer, protocol)
        except RemoteRefused:
            if not self._may_seek(peer):
                raise
            await self._admission.seek(peer)  # we trust it, but it forgot us
        except Unavailable:
            if peer in self._host.connected():
                raise
            await self.reach(peer)  # it let the connection go at that moment
        return await self._host.open_stream(peer, protocol)

    def _may_seek(self, peer: PeerId) -> bool:
        """Seldom: whoever refuses us for good must not be asked with each call."""
        now = trio.current_time()
        self._sought = {p: at for p, at in self._sought.items() if at > now}
        if peer in self._sought:
            return False
        self._sought[peer] = now + SEEK_SECONDS
        return True

    async def _dial(self, peer: PeerId, addrs: Sequence[str]) -> None:
        """Have a control connection; of those who want one at once, one dials."""
        # bounded by those who wait; dropped with its last user
        lock = self._dials.setdefault(peer, trio.Lock())
        try:
            async with lock:
                if peer not in self._host.connected():
                    await self._host.connect(peer, ranked(self._rank, peer, addrs))
        finally:
            if not lock.locked():
                self._dials.pop(peer, None)

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
