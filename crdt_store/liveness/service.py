"""Liveness over RPC: the shell that calls, answers and tells who watches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from random import Random

import trio

from crdt_store.liveness.config import LivenessConfig
from crdt_store.liveness.core import Call, State, Swim
from crdt_store.liveness.messages import (
    CODEC,
    METHOD,
    Ack,
    Load,
    Ping,
    check_alive,
    sign_alive,
)
from crdt_store.liveness.messages import decode_untrusted as decode_message_untrusted
from crdt_store.watch_service import Watch, Watchers
from fabric.core.errors import FabricError, RemoteProtocolError
from fabric.core.ids import MeshId, PeerId, short
from fabric.core.signing import Signer
from fabric.core.telemetry import DROPPED, PROTOCOL_ERRORS, Counters
from fabric.net.rpc_api import Rpc

_LOG = logging.getLogger(__name__)

TABLE = "liveness"
"""What watches of liveness are called among those of the store."""
LOOK_SECONDS = 1.0
"""How soon a fresh connection counts as a sign of life."""
INCARNATIONS_PER_START = 4096
"""Room to refute suspicions within one run, below the numbers of the next."""
MAX_TOLD = 32
"""Words left with silent peers at once: each waits for as long as a suspicion."""


class Liveness:
    """Who is there, as this peer sees it.

    Args:
        core: Decides; touched by this service only.
        rpc: Calls; ``store.alive`` is registered on it.
        members: Who has a membership record now.
        watchers: Where changes are announced.
        counters: Refused claims, malformed messages.

    Attributes:
        load_source: Tells how busy this peer is; asked for each message.
        neighbours: Tells whom to probe; None: all members.
    """

    def __init__(
        self,
        core: Swim,
        rpc: Rpc,
        members: Callable[[], Iterable[PeerId]],
        watchers: Watchers,
        counters: Counters,
    ) -> None:
        self.load_source: Callable[[], Load] = Load
        self.neighbours: Callable[[], frozenset[PeerId] | None] = lambda: None
        self._core = core
        self._rpc = rpc
        self._members = members
        self._watchers = watchers
        self._members_changed = watchers.watch("m", "0", "inv")
        self._counters = counters
        self._counted: Counter[str] = Counter()
        self._connected: frozenset[PeerId] = frozenset()
        self._told = 0
        self._wake = trio.Event()
        rpc.register_async(METHOD, self.serve_untrusted)

    # --- what others may ask

    def state(self, peer: PeerId) -> State:
        """Return what we believe of ``peer``; "unreachable" means from here."""
        return self._core.state(peer)

    def dead(self) -> frozenset[PeerId]:
        """Return the members whose record is all that is left of them."""
        return self._core.dead

    def load(self, peer: PeerId) -> Load | None:
        """Return how busy ``peer`` said it was in the last 30 s, or None."""
        if peer == self._core.me:
            return self.load_source()
        return self._core.loads.get(peer, trio.current_time())

    def heard_seconds_ago(self, peer: PeerId) -> float | None:
        """Return how long ago ``peer`` itself said something to us, if lately."""
        at = self._core.heard_at(peer)
        return None if at is None else max(0.0, trio.current_time() - at)

    @property
    def awareness(self) -> int:
        """How slow this peer is itself: 0, or by how much it waits longer."""
        return self._core.awareness

    def watch(self) -> Watch:
        """Return a watch that wakes when somebody's state changed."""
        return self._watchers.watch(TABLE)

    # --- the door

    async def serve_untrusted(self, peer: PeerId, data: bytes) -> bytes:
        """Answer a probe of ``peer``, through us or of us.

        Raises:
            RemoteProtocolError: malformed.
        """
        message = self._decode_untrusted(data)
        if not isinstance(message, Ping):
            self._counters.add(PROTOCOL_ERRORS, label="liveness")
            raise RemoteProtocolError("an Ack is no question")
        self._core.load = self.load_source()
        answer = self._core.receive(peer, message, trio.current_time())
        self._wake.set()
        if isinstance(answer, Call):
            answer = await self._relay(peer, answer)
        return CODEC.encode(answer)

    async def _relay(self, asker: PeerId, call: Call) -> Ack:
        ack: Ack | None = None
        relayed = self._core.relayed
        try:
            ack = await self._ask(call)
        finally:  # also when the asker hung up: its place is free again
            answer = relayed(asker, call, ack, trio.current_time())
            self._wake.set()
        return answer

    def _decode_untrusted(self, data: bytes) -> Ping | Ack:
        try:
            return decode_message_untrusted(data)
        except RemoteProtocolError:
            self._counters.add(PROTOCOL_ERRORS, label="liveness")
            raise

    # --- the tasks

    async def run(self) -> None:
        """Probe and be told what happens to connections, until cancelled."""
        self._core.set_members(self._members())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_members)
            nursery.start_soon(self._follow_losses)
            while True:
                self._look()
                for call in self._core.poll(trio.current_time()):
                    self._start(call, nursery)
                self._announce()
                due = trio.current_time() + LOOK_SECONDS
                with trio.move_on_at(min(due, self._core.next_timeout())):
                    await self._wake.wait()
                self._wake = trio.Event()

    async def _follow_members(self) -> None:
        async for _ in self._members_changed:
            self._core.set_members(self._members())
            self._wake.set()

    async def _follow_losses(self) -> None:
        with self._rpc.lost() as lost:
            async for peer in lost:
                self._core.broke(peer)
                self._wake.set()

    def _look(self) -> None:
        self._core.load = self.load_source()
        self._core.set_neighbours(self.neighbours())
        connected = self._rpc.connected()
        for peer in connected - self._connected:
            self._core.connected(peer, trio.current_time())
        self._connected = connected

    def _start(self, call: Call, nursery: trio.Nursery) -> None:
        """Make a call; the core bounds those that decide something."""
        if call.about:
            nursery.start_soon(self._call, call)
        elif self._told < MAX_TOLD:
            self._told += 1
            nursery.start_soon(self._leave_word, call)
        else:
            self._counters.add(DROPPED, label="liveness_words")

    async def _leave_word(self, call: Call) -> None:
        try:
            await self._call(call)
        finally:
            self._told -= 1

    async def _call(self, call: Call) -> None:
        ack = await self._ask(call)
        if ack is not None:
            self._core.answered(call, ack, trio.current_time())
        else:
            self._core.failed(call, trio.current_time())
        self._wake.set()

    async def _ask(self, call: Call) -> Ack | None:
        """Return the answer to ``call``; None if none came in time."""
        with trio.move_on_at(call.deadline):
            try:
                raw = await self._rpc.call(call.peer, METHOD, CODEC.encode(call.ping))
                message = self._decode_untrusted(raw)
            except FabricError as exc:
                _LOG.debug(
                    "liveness.silent peer=%s code=%s", short(call.peer), exc.code
                )
                return None
            return message if isinstance(message, Ack) else None
        return None

    def _announce(self) -> None:
        changed = self._core.take_changes()
        for peer in changed:
            _LOG.info("liveness.changed peer=%s %s", short(peer), self.state(peer))
        if changed:
            self._watchers.touched({TABLE})
        for name, count in (self._core.counts - self._counted).items():
            self._counters.add("liveness_refused_total", count, label=name)
        self._counted = Counter(self._core.counts)


def make_liveness(
    config: LivenessConfig,
    signer: Signer,
    mesh: MeshId,
    rpc: Rpc,
    members: Callable[[], Iterable[PeerId]],
    watchers: Watchers,
    counters: Counters,
    rng: Random,
    starts: int,
) -> Liveness:
    """Return the liveness of one peer; ``starts`` counts its runs, this one included.

    Call it within trio: it reads the clock.
    """
    core = Swim(
        signer.peer_id,
        config,
        rng,
        incarnation=starts * INCARNATIONS_PER_START,
        sign=partial(sign_alive, signer, mesh),
        verify=partial(check_alive, mesh),
        now=trio.current_time(),
    )
    return Liveness(core, rpc, members, watchers, counters)
