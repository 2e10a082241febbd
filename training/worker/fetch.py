"""Get a round's start state from several peers at once. Pure: no sockets, no clock.

The generation names the state by the digest of its block digests. So first the list,
from any one source, checked against that name; then each 1 MiB block, from all sources
in parallel, checked against the list. A source that lies is never asked again, one that
is lost or slow has its blocks asked elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fabric.core.digest import BLOCK_BYTES, digest
from fabric.core.errors import IntegrityError
from fabric.core.ids import PeerId
from training.messages import StateBlockRequest, StateListRequest

WINDOW_BLOCKS = 3
"""Blocks asked of one source at a time: one on the wire, one being cut, one asked."""
GATHER_SOURCES = 2
"""Sources to wait for before blocks are asked, so that no one carries it all."""
GATHER_SHARE = 0.2
"""Share of patience for which a lone source waits for company."""
_LIST = -1

Request = StateListRequest | StateBlockRequest


@dataclass
class _Source:
    ready: bool = False
    refused: bool = False
    slow: int = 0
    waiting: dict[int, float] = field(default_factory=dict)


class StateFetch:
    """One transfer of one state.

    Args:
        name: Hex digest of the state (BLAKE3 of the block digests).
        state_bytes: Its size, which the model's shape implies.
        sources: Who is said to hold it.
        patience_seconds: Longest wait for one answer.
    """

    def __init__(
        self,
        name: str,
        state_bytes: int,
        sources: Iterable[PeerId],
        *,
        patience_seconds: float,
    ) -> None:
        self.name = name
        self.data = bytearray(state_bytes)
        self.received_from: dict[PeerId, int] = {}
        self._num_blocks = -(-state_bytes // BLOCK_BYTES)
        self._patience = patience_seconds
        self._sources = {peer: _Source() for peer in sorted(sources)}
        self._digests: tuple[bytes, ...] = ()
        self._missing: list[int] = [_LIST]
        self._gather_until: float | None = None

    @property
    def done(self) -> bool:
        """Whether :attr:`data` is complete and verified."""
        return not self._missing and not any(
            source.waiting for source in self._sources.values()
        )

    @property
    def hopeless(self) -> bool:
        """Whether every source has lied or said that it lacks the state."""
        return all(source.refused for source in self._sources.values())

    def source_ready(self, peer: PeerId) -> None:
        """Both connections with ``peer`` stand: it can be asked."""
        if source := self._sources.get(peer):
            source.ready = True

    def source_lost(self, peer: PeerId) -> None:
        """A connection with ``peer`` broke: ask others for what it owes."""
        if source := self._sources.get(peer):
            source.ready = False
            self._release(source)

    def requests(self, now: float) -> Iterator[tuple[PeerId, Request]]:
        """Yield what to ask of whom at ``now`` (monotonic seconds)."""
        for source in self._sources.values():
            if any(deadline <= now for deadline in source.waiting.values()):
                source.slow += 1
                self._release(source)
        if self._gathering(now):
            return
        # Least often slow, then least loaded: blocks spread over the sources, and a
        # silent one is not asked for the same block again and again.
        while self._missing and (ready := self._askable()):
            peer, source = min(
                ready, key=lambda item: (item[1].slow, len(item[1].waiting), item[0])
            )
            index = self._missing.pop(0)
            source.waiting[index] = now + self._patience
            yield peer, self._request(index)

    def next_deadline(self) -> float | None:
        """Return when :meth:`requests` must be called again, or None."""
        deadlines = [
            deadline
            for source in self._sources.values()
            for deadline in source.waiting.values()
        ]
        if self._gather_until is not None:
            deadlines.append(self._gather_until)
        return min(deadlines, default=None)

    def _gathering(self, now: float) -> bool:
        """Whether to wait a little for a second source before asking for blocks."""
        usable = [s for s in self._sources.values() if not s.refused]
        ready = sum(source.ready for source in usable)
        waits = (
            bool(self._digests)
            and not self.received_from
            and 0 < ready < min(GATHER_SOURCES, len(usable))
        )
        if not waits:
            self._gather_until = None
            return False
        if self._gather_until is None:
            self._gather_until = now + GATHER_SHARE * self._patience
        return now < self._gather_until

    def list_received(self, peer: PeerId, payload: bytes | bytearray) -> None:
        """Accept ``peer``'s list of block digests.

        Raises:
            IntegrityError: it is not the list that the state's name stands for.
        """
        if not self._answered(peer, _LIST, payload):
            return
        if len(payload) != 32 * self._num_blocks or digest(payload).hex() != self.name:
            self._refuse(peer, _LIST)
            raise IntegrityError(f"state list from {peer} does not match its name")
        self._digests = tuple(
            bytes(payload[at : at + 32]) for at in range(0, len(payload), 32)
        )
        self._missing.extend(range(self._num_blocks))

    def block_received(
        self, peer: PeerId, index: int, payload: bytes | bytearray
    ) -> None:
        """Accept a block from ``peer``.

        Raises:
            IntegrityError: its digest is not the listed one.
        """
        if not self._answered(peer, index, payload):
            return
        at = index * BLOCK_BYTES
        wanted = min(BLOCK_BYTES, len(self.data) - at)
        if len(payload) != wanted or digest(payload) != self._digests[index]:
            self._refuse(peer, index)
            raise IntegrityError(f"block {index} of the state from {peer} is corrupt")
        self.data[at : at + wanted] = payload
        self.received_from[peer] = self.received_from.get(peer, 0) + wanted

    def _answered(self, peer: PeerId, index: int, payload: bytes | bytearray) -> bool:
        """Take an answer off the list of what ``peer`` owes; False if it is no use."""
        source = self._sources.get(peer)
        if source is None or source.waiting.pop(index, None) is None:
            return False  # asked elsewhere since, or never
        if not payload:
            self._refuse(peer, index)
            return False
        return True

    def _askable(self) -> list[tuple[PeerId, _Source]]:
        return [
            (peer, source)
            for peer, source in self._sources.items()
            if source.ready
            and not source.refused
            and len(source.waiting) < WINDOW_BLOCKS
        ]

    def _request(self, index: int) -> Request:
        if index == _LIST:
            return StateListRequest(self.name)
        return StateBlockRequest(self.name, index)

    def _refuse(self, peer: PeerId, index: int) -> None:
        source = self._sources[peer]
        source.refused = True
        self._missing.insert(0, index)
        self._release(source)

    def _release(self, source: _Source) -> None:
        self._missing.extend(source.waiting)
        source.waiting.clear()
