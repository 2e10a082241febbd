"""One end of a one-way connection: bytes, and whether the other end is alive.

Slow is not dead. A peer that computes, or waits for a third, says so with a beat every
``beat_seconds``, forward from the sending end and back from the receiving end; silence
is counted in beats that *we* waited for, so a process that was stopped and goes on does
not accuse everyone else. One thread at a time owns an end: TLS objects need that.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from fabric.bulk.tls import tls_errors
from fabric.core.errors import FabricError, RemoteProtocolError, Unavailable
from training.worker.collectives.errors import PeerLost, PeerSilent
from training.worker.collectives.wire import (
    HEAD_BYTES,
    NOBODY,
    WORD_BYTES,
    Head,
    Kind,
    decode_head_untrusted,
    decode_word_untrusted,
    encode_word,
)

BEATS_PER_PATIENCE = 5
"""Beats missed in a row before a peer is called silent."""
CHUNK_BYTES = 1 << 20
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Duplex(Protocol):
    """What an end needs of a socket, plain or TLS."""

    def send(self, data: bytes | memoryview, /) -> int:
        """Send some of ``data``; return how much."""
        ...

    def recv(self, nbytes: int, /) -> bytes:
        """Return up to ``nbytes``."""
        ...

    def recv_into(self, buffer: bytearray | memoryview, /) -> int:
        """Receive what there is into ``buffer``; return how much."""
        ...

    def settimeout(self, value: float | None, /) -> None:
        """Bound each later call, in seconds."""
        ...

    def shutdown(self, how: int, /) -> None:
        """Shut down, from any thread."""
        ...

    def close(self) -> None:
        """Close."""
        ...


@dataclass
class Opened:
    """A connected, authenticated, one-way connection.

    Attributes:
        sock: Plain or TLS; full duplex, the way back carries words only.
        memory: Shared with the other end, for what is too large for the socket.
        path: "local", "direct", ...: for people.
    """

    sock: Duplex
    memory: mmap.mmap | None = None
    path: str = "direct"


@dataclass(frozen=True)
class Member:
    """Who is at the other end."""

    rank: int
    name: str


@dataclass
class Pulse:
    """Counts the beats that were missed, and learns how long gaps may last.

    Attributes:
        patience_seconds: The one knob: silence for longer ends the group.
        longest: Most beats missed by a peer that then went on.
    """

    patience_seconds: float
    longest: int = 0
    _missed: int = field(default=0, repr=False)

    @property
    def beat_seconds(self) -> float:
        """How often an end says that it is alive, and looks."""
        return self.patience_seconds / BEATS_PER_PATIENCE

    def heard(self) -> None:
        """The peer did something."""
        if self._missed:
            self.longest = max(self.longest, self._missed)
            self._missed = 0

    def missed(self) -> bool:
        """A beat passed in silence; return whether that is too long.

        A peer that is slow to beat (its processor is shared) has shown how slow: it
        gets twice its longest gap.
        """
        self._missed += 1
        return self._missed > max(BEATS_PER_PATIENCE, 2 * self.longest)


class Line:
    """One end; see :class:`SendingEnd` and :class:`ReceivingEnd`."""

    def __init__(self, opened: Opened, member: Member, patience_seconds: float) -> None:
        self.member = member
        self.memory = opened.memory
        self.path = opened.path
        self.sock = opened.sock
        self.pulse = Pulse(patience_seconds)
        self.bytes_moved = 0
        self.sock.settimeout(self.pulse.beat_seconds)

    def wake(self) -> None:
        """Make a blocked read of the owner end, from any thread."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Give the descriptor back."""
        with contextlib.suppress(OSError):
            self.sock.close()

    def silent(self, doing: str) -> PeerSilent:
        """Return the error of a peer that was silent while we were ``doing``."""
        seconds = self.pulse.patience_seconds
        return PeerSilent(
            self.member.name, self.member.rank, f"silent for {seconds:g} s {doing}"
        )

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Name the peer in what sockets raise."""
        try:
            with tls_errors():
                yield
        except PeerSilent:
            raise
        except Unavailable as exc:
            member = self.member
            raise PeerLost(member.name, member.rank, exc.reason) from exc

    def lost(self, reason: str) -> PeerLost:
        """Return the error of a peer that is gone."""
        return PeerLost(self.member.name, self.member.rank, reason)


class SendingEnd(Line):
    """Writes heads and pieces, hears words."""

    def __init__(self, opened: Opened, member: Member, patience_seconds: float) -> None:
        super().__init__(opened, member, patience_seconds)
        self._words = bytearray()
        self.freed: list[int] = []
        """Slots that came back since the owner last looked."""

    def write(self, data: bytes | memoryview, give_up: Callable[[], object]) -> None:
        """Send all of ``data``.

        Args:
            data: At most a piece.
            give_up: Called every beat in which nothing moves; may raise.
        """
        view = memoryview(data)
        at = 0
        while at < len(view):
            try:
                at += self.sock.send(view[at : at + CHUNK_BYTES])
                self.pulse.heard()
            except TimeoutError:
                give_up()
                self.hear()
                if self.pulse.missed():
                    raise self.silent("while we sent") from None
        self.bytes_moved += len(view)

    def beat(self) -> None:
        """Say that we are alive."""
        self.write(Head(Kind.BEAT).encode(), lambda: None)

    def hear(self) -> None:
        """Take the words that are there, without waiting."""
        self.sock.settimeout(0)
        try:
            while self._read_words():
                pass
        except _WOULD_BLOCK:
            pass
        finally:
            self.sock.settimeout(self.pulse.beat_seconds)

    def listen(self) -> bool:
        """Wait for words, at most a beat; return whether there were any."""
        try:
            return self._read_words()
        except TimeoutError:
            return False

    def _read_words(self) -> bool:
        data = self.sock.recv(64 * WORD_BYTES)
        if not data:
            raise self.lost("closed the connection")
        self.pulse.heard()
        self._words += data
        while len(self._words) >= WORD_BYTES:
            kind, value = decode_word_untrusted(self._words[:WORD_BYTES])
            del self._words[:WORD_BYTES]
            if kind is Kind.ABORT:
                raise AbortHeard(value)
            if kind is Kind.FREE:
                self.freed.append(value)
        return True


class ReceivingEnd(Line):
    """Reads heads and pieces, says words."""

    def read(
        self, view: bytearray | memoryview, idle: Callable[[], object], doing: str
    ) -> None:
        """Fill ``view``.

        Args:
            view: Filled from the front.
            idle: Called every beat in which nothing comes; may raise.
            doing: For the error.
        """
        into = memoryview(view)
        at = 0
        while at < len(into):
            try:
                got = self.sock.recv_into(into[at : at + CHUNK_BYTES])
            except TimeoutError:
                idle()
                self.say(Kind.BEAT)
                if self.pulse.missed():
                    raise self.silent(doing) from None
                continue
            if not got:
                idle()
                raise self.lost("closed the connection")
            self.pulse.heard()
            at += got
        self.bytes_moved += len(into)

    def head(self, idle: Callable[[], object]) -> Head:
        """Return the next head that is no beat."""
        while True:
            data = bytearray(HEAD_BYTES)
            self.read(data, idle, "while we waited")
            head = decode_head_untrusted(data)
            if head.kind is Kind.ABORT:
                raise AbortHeard(head.value)
            if head.kind is not Kind.BEAT:
                return head

    def say(self, kind: Kind, value: int = 0) -> None:
        """Send a word back; a way back that is full is not read, and beats can go."""
        with contextlib.suppress(TimeoutError):
            self.sock.send(encode_word(kind, value))


class AbortHeard(FabricError):
    """The other end said that the group is over; the owner asks whose fault it was."""

    default_code = "E_ABORTED"

    def __init__(self, rank: int) -> None:
        super().__init__(f"aborted because of rank {rank}")
        self.rank = -1 if rank == NOBODY else rank


def check_rank_untrusted(rank: int, size: int) -> int:
    """Return ``rank`` if a group of ``size`` has it.

    Raises:
        RemoteProtocolError: it has not.
    """
    if not -1 <= rank < size:
        raise RemoteProtocolError(f"rank {rank} in a group of {size}")
    return rank
