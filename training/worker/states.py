"""Start states between workers: fetch one as a newcomer, serve ours as a source."""

from __future__ import annotations

import time
from collections.abc import Callable

from fabric.core.errors import Unavailable
from fabric.core.ids import PeerId
from fabric.jobs.messages import Generation
from training.messages import (
    Event,
    Numbers,
    StateBlock,
    StateBlockRequest,
    StateList,
    StateListRequest,
)
from training.worker.exchange import Exchange
from training.worker.fetch import StateFetch
from training.worker.trainer import Trainer

MAX_PENDING_REQUESTS = 64
"""State requests of one peer kept until there is a way to answer."""

Request = StateListRequest | StateBlockRequest


class StateExchange:
    """Moves states over the exchange's connections; main thread only.

    Args:
        me: This peer.
        exchange: The connections.
        trainer: Keeps the states we can serve.
        tell: Sends an event to the daemon.
        patience_seconds: Longest wait for one answer.
    """

    def __init__(
        self,
        me: PeerId,
        exchange: Exchange,
        trainer: Trainer,
        tell: Callable[[Event], None],
        *,
        patience_seconds: float,
    ) -> None:
        self._me = me
        self._exchange = exchange
        self._trainer = trainer
        self._tell = tell
        self._patience = patience_seconds
        self._fetch: StateFetch | None = None
        self._pending: dict[PeerId, list[Request]] = {}

    def begin(self, generation: Generation) -> None:
        """Fetch the start state of ``generation`` from its sources."""
        sources = [PeerId(peer) for peer in generation.sources if peer != self._me]
        self._fetch = StateFetch(
            generation.state_digest,
            self._trainer.state_bytes,
            sources,
            patience_seconds=self._patience,
        )
        for peer in sources:
            self.connected(peer)

    def cancel(self) -> None:
        """Stop fetching: another generation starts from another state."""
        self._fetch = None

    def connected(self, peer: PeerId) -> None:
        """A connection with ``peer`` opened: ask it, and answer what it asked."""
        if self._fetch and self._exchange.both_ways(peer):
            self._fetch.source_ready(peer)
        if self._exchange.has(peer, outgoing=True):
            for request in self._pending.pop(peer, []):
                self.serve(peer, request)

    def lost(self, peer: PeerId) -> None:
        """A connection with ``peer`` broke."""
        self._pending.pop(peer, None)
        if self._fetch:
            self._fetch.source_lost(peer)

    def serve(self, peer: PeerId, request: Request) -> None:
        """Answer a newcomer; an empty payload says that we do not hold that state."""
        if not self._exchange.has(peer, outgoing=True):
            waiting = self._pending.setdefault(peer, [])
            if len(waiting) < MAX_PENDING_REQUESTS:
                waiting.append(request)
            return
        served = self._trainer.served(request.digest)
        match request:
            case StateListRequest(name):
                listing = served.listing if served else b""
                self._exchange.send(peer, StateList(name), listing)
            case StateBlockRequest(name, index):
                block = served.block(index) if served else b""
                self._exchange.send(peer, StateBlock(name, index), block)

    def answered(
        self, peer: PeerId, answer: StateList | StateBlock, payload: bytearray
    ) -> None:
        """Take an answer from a source.

        Raises:
            IntegrityError: it is not what the state's name stands for.
        """
        if self._fetch is None or self._fetch.name != answer.digest:
            return
        match answer:
            case StateList():
                self._fetch.list_received(peer, payload)
            case StateBlock(index=index):
                self._fetch.block_received(peer, index, payload)

    def poll(self) -> bytearray | None:
        """Ask for what is missing; return the state's bytes once they are complete.

        Raises:
            Unavailable: no source is left that could have the state.
        """
        fetch = self._fetch
        if fetch is None:
            return None
        if fetch.hopeless:
            raise Unavailable("no source gave the state", code="E_NO_STATE")
        for peer, request in fetch.requests(time.monotonic()):
            if not self._exchange.send(peer, request):
                fetch.source_lost(peer)
        if not fetch.done:
            return None
        self._fetch = None
        shares = {f"state_bytes:{p}": n for p, n in fetch.received_from.items()}
        self._tell(Numbers({"state_sources": len(shares), **shares}))
        return fetch.data

    def seconds_to_deadline(self) -> float | None:
        """Return when :meth:`poll` must run again, or None."""
        deadline = self._fetch.next_deadline() if self._fetch else None
        return None if deadline is None else max(0.0, deadline - time.monotonic())
