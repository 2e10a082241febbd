"""Many Swim cores on a network of virtual time: latency, kills, stalls, cuts, lies."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

from crdt_store.liveness.config import LivenessConfig
from crdt_store.liveness.core import Call, State, Swim
from crdt_store.liveness.messages import CODEC, Ack
from fabric.app.neighbours import Rings
from fabric.core.digest import digest
from fabric.core.ids import PeerId

LATENCY = 0.02


def name(number: int) -> PeerId:
    """Return an id as long as real ones: most of a message is ids."""
    return PeerId(f"12D3KooW{number:044d}")


def seal_of(peer: PeerId, incarnation: int) -> bytes:
    """Stand for a signature, and be as long."""
    return 2 * digest(f"{peer}:{incarnation}".encode())


class Fleet:
    """Members that know each other; ``run`` moves the clock."""

    def __init__(self, count: int, *, seed: int = 0, config=None, limit=0) -> None:
        self.limit = limit
        self._settled = (0, 0)
        self.config = config or LivenessConfig()
        self.rng = random.Random(seed)
        self.now = 0.0
        self.cores: dict[PeerId, Swim] = {}
        self.killed: set[PeerId] = set()
        self.stalled: dict[PeerId, float] = {}
        self.cut: set[frozenset[PeerId]] = set()
        self.loss = 0.0
        self.bytes: Counter[PeerId] = Counter()
        self.messages = 0
        self.largest = 0
        self._events: list = []
        self._timers: dict[PeerId, float] = {}
        self._serial = itertools.count()
        for number in range(count):
            self.boot(name(number))

    def boot(self, peer: PeerId, incarnation: int = 0) -> None:
        members = {*self.cores, peer}
        self.killed.discard(peer)
        self.cores[peer] = Swim(
            peer,
            self.config,
            random.Random(f"{self.rng.random()}"),
            incarnation=incarnation,
            sign=lambda number: seal_of(peer, number),
            verify=lambda who, number, seal: seal == seal_of(who, number),
            now=self.now,
        )
        for core in self.cores.values():
            core.set_members(members)
        self.settle_neighbours()
        self._touch(peer)

    def settle_neighbours(self) -> None:
        """Have everybody choose its neighbours by what it believes, if there are any"""
        deaths = sum(len(core.dead) for core in self.cores.values())
        if self.limit and self._settled != (len(self.cores), deaths):
            self._settled = len(self.cores), deaths
            rings = Rings(self.limit // 2)
            rings.set_peers(set(self.cores))
            for peer in self.alive():
                core = self.cores[peer]
                core.set_neighbours(rings.around(peer, core.dead))

    def kill(self, peer: PeerId, *, noticed: bool = True) -> None:
        """End a process; with ``noticed`` its connections break, as on a live host."""
        self.killed.add(peer)
        if noticed:
            for other in self.alive():
                if not self.limit or other in self.near_of(peer):
                    self.cores[other].broke(peer)
                    self._touch(other)

    def near_of(self, peer: PeerId) -> set[PeerId]:
        """Return whom ``peer`` has connections with."""
        rings = Rings(self.limit // 2)
        rings.set_peers(set(self.cores))
        return rings.around(peer)

    def stall(self, peer: PeerId, seconds: float) -> None:
        """Stop a process; what it gets waits until then."""
        self.stalled[peer] = self.now + seconds

    def partition(self, side: set[PeerId]) -> None:
        self.cut = {
            frozenset({a, b}) for a in side for b in self.cores if b not in side
        }

    def heal(self) -> None:
        """Mend the cut; whoever was cut off connects again, as the connector does."""
        mended, self.cut = self.cut, set()
        for pair in mended:
            one, other = sorted(pair)
            if not {one, other} & self.killed:
                self.cores[one].connected(other, self.now)
                self.cores[other].connected(one, self.now)
                self._touch(one)
                self._touch(other)

    def alive(self) -> list[PeerId]:
        return [peer for peer in self.cores if peer not in self.killed]

    def views(self, subject: PeerId) -> set[State]:
        return {self.cores[p].state(subject) for p in self.alive() if p != subject}

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, peer, act = heapq.heappop(self._events)
            if peer in self.killed:
                continue
            awake = self.stalled.get(peer, 0.0)
            if self.now < awake:  # it happens when the process runs again
                self._at(awake, peer, act)
                continue
            act()
            self._touch(peer)
        self.now = end

    def run_until(self, condition, limit: float) -> float:
        """Run until ``condition()``; return how long it took."""
        begun = self.now
        while not condition():
            assert self.now - begun < limit, f"not within {limit} s"
            self.run(0.25)
            self.settle_neighbours()
        return self.now - begun

    def _at(self, when: float, peer: PeerId, act) -> None:
        heapq.heappush(self._events, (when, next(self._serial), peer, act))

    def _touch(self, peer: PeerId) -> None:
        """Poll a core, start its calls, come back when it wants."""
        core = self.cores[peer]
        for call in core.poll(self.now):
            self._call(core, call, call.deadline, core.answered, core.failed)
        due = max(core.next_timeout(), self.now)
        if not self.now < self._timers.get(peer, 0.0) <= due:
            self._timers[peer] = due
            self._at(due, peer, lambda: None)

    def _call(self, core: Swim, call: Call, deadline: float, answered, failed) -> None:
        done: list[bool] = []
        self._count(core.me, call.ping)

        def take(ack: Ack) -> None:
            if not done:
                done.append(True)
                answered(call, ack, self.now)

        def give_up() -> None:
            if not done:
                done.append(True)
                failed(call, self.now)

        self._at(deadline, core.me, give_up)
        if not self._passes(core.me, call.peer):
            if call.peer in self.killed:
                self._at(self.now + LATENCY, core.me, give_up)  # refused
            return
        self._at(
            self.now + self._latency(),
            call.peer,
            lambda: self._serve(call.peer, core.me, call, take),
        )

    def _serve(self, peer: PeerId, sender: PeerId, call: Call, take) -> None:
        core = self.cores[peer]
        answer = core.receive(sender, call.ping, self.now)
        if isinstance(answer, Ack):
            self._reply(peer, sender, answer, take)
            return
        self._call(
            core,
            answer,
            answer.deadline,
            lambda c, ack, now: self._reply(
                peer, sender, core.relayed(sender, c, ack, now), take
            ),
            lambda c, now: self._reply(
                peer, sender, core.relayed(sender, c, None, now), take
            ),
        )

    def _reply(self, peer: PeerId, sender: PeerId, ack: Ack, take) -> None:
        self._count(peer, ack)
        if self._passes(peer, sender):
            self._at(self.now + self._latency(), sender, lambda: take(ack))

    def _latency(self) -> float:
        return LATENCY * (0.5 + self.rng.random())

    def _passes(self, one: PeerId, other: PeerId) -> bool:
        if other in self.killed or frozenset({one, other}) in self.cut:
            return False
        return self.rng.random() >= self.loss

    def _count(self, peer: PeerId, message) -> None:
        size = len(CODEC.encode(message))
        self.bytes[peer] += size
        self.messages += 1
        self.largest = max(self.largest, size)
