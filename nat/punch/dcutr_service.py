"""``/libp2p/dcutr``: relayed control connections become direct ones.

Who was dialled through a relay starts (step 1 of the protocol): first it dials the
other's public addresses, then both dial each other at once from the port that they
listen at, whose mapping peers have observed. The other side is the client of what
comes out of it, whoever dialled. Source: libp2p specs, relay/DCUtR.md.
"""

from __future__ import annotations

import logging
import random

import trio

from fabric.core.errors import (
    FabricError,
    NoRoute,
    RemoteProtocolError,
    RemoteRefused,
)
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import PROTOCOL_ERRORS, REFUSALS, Counters
from fabric.net.host import PeerConnected
from fabric.net.traversal_api import TraversalHost
from nat.history import History, PunchNotes, outcome
from nat.punch.backoff import Backoff
from nat.punch.config import PunchConfig
from nat.punch.dcutr_round_service import ControlSurroundings, DcutrRound, NotReady
from nat.punch.facts import FAILED
from nat.punch.limits import PunchLimits
from nat.punch.messages import PROTOCOL_DCUTR

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 5.0


class DcutrService:
    """Upgrades inbound relayed connections; answers those who upgrade theirs.

    Args:
        host: Has the connections; its gate decides who may speak the protocol.
        config: Bounds.
        surroundings: Our addresses and the peers'.
        counters: Refusals and protocol errors.
        rng: Draws the jitter.
        history: Told how each upgrade that we started went.
    """

    def __init__(
        self,
        host: TraversalHost,
        config: PunchConfig,
        surroundings: ControlSurroundings,
        counters: Counters,
        rng: random.Random | None = None,
        history: History | None = None,
    ) -> None:
        self._host = host
        self._config = config
        self._counters = counters
        self._history = history if history is not None else History()
        self._round = DcutrRound(
            host, config, surroundings, counters, rng or random.Random()
        )
        self._limits = PunchLimits(config)
        self._backoff = Backoff(config.retry_seconds)
        self._refused = Backoff(config.refused_seconds)
        self._running: set[PeerId] = set()
        self._both_since: dict[PeerId, float] = {}
        self._wake = trio.Event()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Upgrade and answer until cancelled."""
        self._host.set_handler(PROTOCOL_DCUTR, self._serve)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_events)
            task_status.started()
            while True:
                now = trio.current_time()
                for peer in self._due(now):
                    self._running.add(peer)
                    nursery.start_soon(self._upgrade, peer)
                await self._leave_relays(now)
                self._wake = trio.Event()
                with trio.move_on_after(self._pause(trio.current_time())):
                    await self._wake.wait()

    def network_changed(self) -> None:
        """Try everyone again."""
        self._backoff.network_changed()
        self._refused.network_changed()
        self._wake.set()

    def reason(self, peer: PeerId) -> str:
        """Return why the connection with ``peer`` is still relayed, or nothing."""
        return self._backoff.reason(peer) or self._refused.reason(peer)

    async def _watch_events(self) -> None:
        with self._host.events() as events:
            async for event in events:
                if isinstance(event, PeerConnected):
                    self._refused.succeeded(event.peer)
                self._wake.set()

    def _waiting(self) -> dict[PeerId, float]:
        """Return whom to upgrade, and when: only relayed, and they dialled."""
        return {
            peer: max(self._backoff.due(peer), self._refused.due(peer))
            for peer in self._host.connected()
            if peer not in self._running
            and not self._round.is_direct(peer)
            and any(not info.outbound for info in self._host.connections(peer))
        }

    def _due(self, now: float) -> list[PeerId]:
        """Return the peers to upgrade now."""
        room = self._config.max_dcutr - len(self._running)
        waiting = self._waiting()
        due = [peer for peer, when in waiting.items() if when <= now]
        return sorted(due, key=waiting.__getitem__)[: max(0, room)]

    def _pause(self, now: float) -> float:
        """Return how long nothing is due; who is due already waits for room."""
        later = [when - now for when in self._waiting().values() if when > now]
        return min([_CHECK_SECONDS, *later])

    async def _leave_relays(self, now: float) -> None:
        """Close circuits that we dialled and that a direct connection replaced."""
        for peer in self._host.connected():
            infos = self._host.connections(peer)
            relayed = any(info.kind == "relay" and info.outbound for info in infos)
            if not relayed or not self._round.is_direct(peer):
                self._both_since.pop(peer, None)
            elif now - self._both_since.setdefault(peer, now) >= (
                self._config.relay_grace_seconds
            ):
                del self._both_since[peer]
                await self._host.close_connections(peer, "relay")
        for peer in self._both_since.keys() - self._host.connected():
            del self._both_since[peer]

    async def _upgrade(self, peer: PeerId) -> None:
        began, notes = trio.current_time(), PunchNotes()
        reason = ""
        try:
            if not self._refused.reason(peer):  # else that was tried a moment ago
                await self._round.dial_announced(peer)
            for _ in range(self._config.dcutr_attempts):
                if self._round.is_direct(peer):
                    break
                await self._round.start(peer, notes)
        except (RemoteRefused, NotReady) as exc:
            self._refused.failed(peer, trio.current_time(), exc.reason)
            logger.debug("dcutr.refused peer=%s", short(peer))
            return
        except FabricError as exc:
            reason = exc.reason
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            reason = f"control stream broke: {exc}"
        finally:
            self._running.discard(peer)
            self._wake.set()
        now = trio.current_time()
        if self._round.is_direct(peer):
            self._history.on_punch(peer, "control", outcome(began, now), notes)
            self._backoff.succeeded(peer)
            self._refused.succeeded(peer)
            logger.info(
                "dcutr.done peer=%s ms=%.0f punch_ms=%.1f",
                short(peer),
                (now - began) * 1e3,
                notes.punch_ms(now),
            )
            return
        reason = reason or "no connection crossed both NATs"
        ended = outcome(began, now, NoRoute(reason, code=FAILED))
        self._history.on_punch(peer, "control", ended, notes)
        self._backoff.failed(peer, now, reason)
        logger.info("dcutr.failed peer=%s reason=%s", short(peer), reason)

    async def _serve(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        """Do the other side of it; the host closes the stream."""
        try:
            self._limits.begin_untrusted(peer, trio.current_time())
        except FabricError as exc:
            self._counters.add(REFUSALS, label=exc.code)
            return
        try:
            await self._round.answer_untrusted(peer, stream)
        except RemoteProtocolError as exc:
            self._counters.add(PROTOCOL_ERRORS, label="dcutr")
            logger.info("dcutr.malformed peer=%s reason=%s", short(peer), exc.reason)
        except (FabricError, trio.BrokenResourceError, trio.ClosedResourceError):
            logger.debug("dcutr.broken peer=%s", short(peer))
        finally:
            self._limits.end(peer)
            self._wake.set()
