"""One download: a task per source, a thread per connection, the swarm core decides."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from math import inf

import trio

from dht import bitmap
from dht.config import ContentConfig
from dht.messages import BULK_SERVICE, CODEC, METHOD_HAVE, Ask, Have, NotHere
from dht.partial import PartialBlob
from dht.progress import Progress
from dht.swarm import Swarm
from dht.transfer import ContentLink, Outcome
from fabric.core.errors import (
    IntegrityError,
    PeerTimeout,
    RemoteProtocolError,
    RemoteRefused,
    Unavailable,
)
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import PROTOCOL_ERRORS, RECEIVED_BYTES, Counters
from fabric.net.paths_api import BulkPaths
from fabric.net.ports import PROTOCOL_OFFER, Gate
from fabric.net.routing_api import ContentRouting
from fabric.net.rpc_api import Rpc

log = logging.getLogger(__name__)

_MAX_DOUBLINGS = 8
BAD_BLOCKS = "content_bad_blocks_total"


@dataclass(frozen=True)
class ContentNet:
    """The network as content sees it."""

    rpc: Rpc
    paths: BulkPaths
    routing: ContentRouting
    gate: Gate

    def admits(self, peer: PeerId) -> bool:
        """Return whether the gate lets us exchange data with ``peer``."""
        return self.gate.allows(peer, PROTOCOL_OFFER).allowed


Search = Callable[[], Awaitable[Iterable[PeerId]]]
"""Returns the peers said to hold the content now; bounded in time by itself."""


class Download:
    """Brings the missing blocks of one blob here.

    Args:
        net: The network.
        partial: Where blocks are written; owned by the caller.
        swarm: Decides which block comes from whom.
        search: Finds more sources.
        config: Bounds.
        counters: Where bytes and bad blocks are counted.
    """

    def __init__(
        self,
        net: ContentNet,
        partial: PartialBlob,
        swarm: Swarm,
        search: Search,
        config: ContentConfig,
        counters: Counters,
    ) -> None:
        self._net = net
        self._partial = partial
        self._swarm = swarm
        self._search = search
        self._config = config
        self._counters = counters
        self._active: set[PeerId] = set()
        self._banned: set[PeerId] = set()
        self._empty: set[PeerId] = set()
        """Had nothing for us, or refused us, since the last regular search."""
        self._away: dict[PeerId, float] = {}
        """Out of reach, and when to try again."""
        self._failures: Counter[PeerId] = Counter()
        """Connections in a row that brought no block."""
        self._alone_since: float | None = None
        self._received: Counter[PeerId] = Counter()
        self._changed = trio.Event()
        self._progress_at = trio.current_time()
        # a thread per source; one that hangs in a dead socket is abandoned with it
        self._threads = trio.CapacityLimiter(2 * config.max_sources)

    async def run(self, peers: Iterable[PeerId]) -> None:
        """Return when every block is written. Cancelled: what arrived is kept.

        Raises:
            Unavailable: no reachable peer holds the rest, or none sends it.
            ResourceExhausted: the disk is full.
        """
        async with trio.open_nursery() as nursery:
            self._start(nursery, peers)
            search_at = trio.current_time() + self._config.search_interval_seconds
            while not self._swarm.done:
                await self._wait_until(search_at)
                now = trio.current_time()
                if self._swarm.on_timeout(now):
                    self._wake()
                self._check_patience(now)
                self._start(nursery, [p for p, at in self._away.items() if at <= now])
                waiting = bool(self._active or self._away) and now < search_at
                if self._swarm.done or waiting:
                    continue
                if now >= search_at:
                    self._empty.clear()
                self._start(nursery, await self._search())
                search_at = trio.current_time() + self._config.search_interval_seconds
                if not (self._active or self._away):
                    raise self._incomplete("no reachable peer holds the rest")
            nursery.cancel_scope.cancel()

    def progress(self) -> Progress:
        """Return how far it is now."""
        waited = 0.0
        if self._alone_since is not None:
            waited = trio.current_time() - self._alone_since
        return Progress(
            self._swarm.num_held,
            self._swarm.num_wanted,
            len(self._swarm.peers),
            waited,
        )

    def _check_patience(self, now: float) -> None:
        """Fail when the sources, or their absence, have lasted too long.

        Raises:
            Unavailable: no block came for too long.
        """
        if now - self._progress_at >= self._config.stall_timeout_seconds:
            raise self._incomplete("its sources are silent")
        if self._swarm.peers or self._swarm.done:
            self._alone_since = None
            return
        if self._alone_since is None:
            self._alone_since = now
        if self._away and now >= self._patience_ends():
            raise self._incomplete("no reachable peer holds the rest")

    def _patience_ends(self) -> float:
        since = self._alone_since
        return inf if since is None else since + self._config.holders_wait_seconds

    async def _wait_until(self, search_at: float) -> None:
        silent_at = self._swarm.next_timeout()
        deadlines = [
            search_at,
            self._progress_at + self._config.stall_timeout_seconds,
            inf if silent_at is None else silent_at,
            self._patience_ends(),
        ]
        if len(self._active) < self._config.max_sources:
            deadlines += self._away.values()
        changed = self._changed
        with trio.move_on_at(min(deadlines)):
            if self._active or self._away:
                await changed.wait()

    def _start(self, nursery: trio.Nursery, peers: Iterable[PeerId]) -> None:
        now = trio.current_time()
        for peer in peers:
            room = len(self._active) < self._config.max_sources
            new = peer not in self._active | self._banned | self._empty
            due = self._away.get(peer, now) <= now
            if room and new and due and self._net.admits(peer):
                self._away.pop(peer, None)
                self._active.add(peer)
                nursery.start_soon(self._source, peer)

    async def _source(self, peer: PeerId) -> None:
        """Use ``peer`` until it has nothing for us, misbehaves or is out of reach."""
        before = self._received[peer]
        try:
            await self._use(peer)
            self._empty.add(peer)
        except Unavailable as exc:
            self._note_away(peer, exc, got_some=self._received[peer] > before)
        except RemoteRefused:
            self._empty.add(peer)
        except (RemoteProtocolError, IntegrityError):
            self._counters.add(PROTOCOL_ERRORS, label="dht")
            self._banned.add(peer)
        finally:
            self._active.discard(peer)
            self._wake()

    def _note_away(self, peer: PeerId, why: Unavailable, *, got_some: bool) -> None:
        self._failures[peer] = 1 if got_some else self._failures[peer] + 1
        doublings = min(self._failures[peer] - 1, _MAX_DOUBLINGS)
        wait = self._config.source_retry_seconds * 2**doublings
        longest = self._config.source_retry_max_seconds
        self._away[peer] = trio.current_time() + min(wait, longest)
        log.info(
            "content.away root=%s peer=%s held=%d/%d reason=%s",
            self._partial.root[:12],
            short(peer),
            self._swarm.num_held,
            self._swarm.num_wanted,
            why.reason,
        )

    async def _use(self, peer: PeerId) -> None:
        have = await self._ask_have(peer)
        if have is None:
            return
        try:
            with trio.fail_after(self._config.call_timeout_seconds):
                sock = await self._net.paths.dial_bulk(peer, BULK_SERVICE)
        except trio.TooSlowError as exc:
            raise PeerTimeout("bulk connection took too long") from exc
        link = ContentLink(sock, self._partial)
        try:
            self._swarm.add_peer(peer, have)
            await self._pump(peer, link)
        finally:
            link.close()
            self._swarm.remove_peer(peer)

    async def _pump(self, peer: PeerId, link: ContentLink) -> None:
        while not self._swarm.done:
            blocks = self._swarm.next_blocks(peer, trio.current_time())
            if blocks or link.waiting:
                block, outcome = await trio.to_thread.run_sync(
                    link.exchange,
                    blocks,
                    abandon_on_cancel=True,
                    limiter=self._threads,
                )
                self._note(peer, block, outcome)
                continue
            changed = self._changed
            with trio.move_on_after(self._config.search_interval_seconds) as waited:
                await changed.wait()
            if waited.cancelled_caught:
                have = await self._ask_have(peer)
                self._swarm.update_have(peer, have or 0)

    def _note(self, peer: PeerId, block: int, outcome: Outcome) -> None:
        now = trio.current_time()
        match outcome:
            case Outcome.GOOD:
                self._received[peer] += 1
                self._progress_at = now
                self._swarm.on_block(peer, block, now)
                size = self._partial.manifest.block_bytes(block)
                self._counters.add(RECEIVED_BYTES, size, label="content")
            case Outcome.MISSING:
                self._swarm.on_missing(peer, block, now)
            case Outcome.BAD:
                self._counters.add(BAD_BLOCKS)
                if self._swarm.on_bad_block(peer, block, now):
                    raise IntegrityError(f"{peer} sent bad blocks and is banned")
        self._wake()

    async def _ask_have(self, peer: PeerId) -> int | None:
        request = CODEC.encode(Ask(self._partial.root))
        try:
            with trio.fail_after(self._config.call_timeout_seconds):
                raw = await self._net.rpc.call(peer, METHOD_HAVE, request)
        except trio.TooSlowError as exc:
            raise PeerTimeout("no answer to content.have") from exc
        match CODEC.decode_untrusted(raw):
            case Have(bits=bits):
                num_blocks = self._partial.manifest.num_blocks
                return bitmap.decode_untrusted(bits, num_blocks)
            case NotHere():
                return None
            case other:
                raise RemoteProtocolError(f"{type(other).__name__} instead of Have")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _incomplete(self, why: str) -> Unavailable:
        root = self._partial.root
        return Unavailable(
            f"{self._swarm.num_held} of {self._swarm.num_wanted} blocks of "
            f"{root[:12]} are here; {why}",
            code="E_NO_CONTENT",
            next_step="try again, what arrived is kept; "
            "see `fabric status` for the peers that are connected",
        )
