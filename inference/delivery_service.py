"""Tokens from the last stage to their gateways, in order, batched while a call runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from inference.messages import MAX_BATCH_TOKENS, SessionToken, TokenBatch

_CALL_SECONDS = 5.0

Send = Callable[[PeerId, TokenBatch], Awaitable[None]]
GiveUp = Callable[[PeerId, frozenset[str]], Awaitable[None]]


class Delivery:
    """Pending tokens by gateway.

    Bounded by admission: a session has at most its ``max_tokens`` pending, and the
    first stage admits a bounded number of sessions.

    Args:
        job: The job.
        send: Carries a batch to a gateway.
        give_up: Told the sessions whose tokens could not be delivered.
    """

    def __init__(self, job: str, send: Send, give_up: GiveUp) -> None:
        self._job = job
        self._send = send
        self._give_up = give_up
        self._pending: dict[PeerId, list[SessionToken]] = {}
        self._busy: set[PeerId] = set()
        self._wake = trio.Event()

    def add(self, gateway: PeerId, token: SessionToken) -> None:
        """Queue a token; returns at once."""
        self._pending.setdefault(gateway, []).append(token)
        self._wake.set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                for gateway in self._pending.keys() - self._busy:
                    # One task a gateway: a slow one delays no other.
                    self._busy.add(gateway)
                    nursery.start_soon(self._deliver, gateway)

    async def _deliver(self, gateway: PeerId) -> None:
        tokens: list[SessionToken] = []
        try:
            while tokens := self._pending.pop(gateway, []):
                for at in range(0, len(tokens), MAX_BATCH_TOKENS):
                    batch = TokenBatch(
                        self._job, tuple(tokens[at : at + MAX_BATCH_TOKENS])
                    )
                    with trio.fail_after(_CALL_SECONDS):
                        await self._send(gateway, batch)
        except (FabricError, trio.TooSlowError):
            tokens += self._pending.pop(gateway, [])
            await self._give_up(gateway, frozenset(t.session for t in tokens))
        finally:
            self._busy.discard(gateway)
            if gateway in self._pending:
                self._wake.set()
