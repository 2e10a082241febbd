"""Seats of several peers over a network of virtual time, with runners that do sums.

The "model" is a hash. A contribution of peer p to round r is a hash of (state, p), the
next state a hash of the state and the contributions in order, so equal digests mean
that every peer applied exactly the same decisions.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import pytest
import trio

from fabric.core.digest import digest, hex_digest
from fabric.core.ids import PeerId
from fabric.core.signing import Ed25519Signer
from fabric.jobs.effects import (
    Apply,
    Decide,
    Diverged,
    Ended,
    Persist,
    Publish,
    Recorded,
    Retire,
    SaveState,
)
from fabric.jobs.messages import (
    CODEC,
    Commit,
    Generation,
    RoundDecision,
)
from fabric.jobs.promises import RECORD
from fabric.jobs.seat import Seat
from fabric.jobs.spec import (
    FaultSpec,
    JobSpec,
    OuterSpec,
    RequireSpec,
    TrainSpec,
    job_id,
)
from tests.jobs.service_mesh import Mesh
from tests.jobs.sums import Runners, Sums

PATIENCE = 4.0


def signer(number: int) -> Ed25519Signer:
    return Ed25519Signer(digest(f"peer {number}".encode()))


class Net(Runners):
    """Seats, their messages in flight, their runners, and the faults."""

    def __init__(
        self, num_peers: int, *, rounds: int = 3, min_peers: int = 3, seed: int = 0
    ) -> None:
        self.random = random.Random(seed)
        self.signers = [signer(i) for i in range(num_peers)]
        self.ids = [s.peer_id for s in self.signers]
        self.spec = JobSpec(
            train=TrainSpec(outer=OuterSpec(rounds=rounds)),
            require=RequireSpec(min_peers=min_peers),
            fault=FaultSpec(patience_seconds=PATIENCE),
            submitter=self.ids[0],
            nonce="n",
        )
        self.job = job_id(self.spec)
        self.now = 0.0
        self.loss = 0.0
        self.latency = 0.02
        self.groups: list[set[PeerId]] = [set(self.ids)]
        self.cuts: set[frozenset[PeerId]] = set()
        self.tells_cuts = True
        self.assignment = (0, "")
        self.aloof: set[PeerId] = set()
        self.disk: dict[PeerId, bytes] = {}
        self.seats: dict[PeerId, Seat] = {}
        self.sums: dict[PeerId, Sums] = {}
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = 0
        self.commits: dict[int, Generation] = {}
        self.decisions: dict[tuple[int, int], RoundDecision] = {}
        self.log: list[tuple[float, PeerId, Recorded]] = []
        self.diverged = 0
        self.before_deliver: Callable[[PeerId, PeerId, Any], bool] = lambda a, b, m: (
            True
        )
        self.due: dict[PeerId, float] = {}

    # -- faults

    def start(self, index: int) -> None:
        peer = self.ids[index]
        raw = self.disk.get(peer)
        record = RECORD.decode_untrusted(raw) if raw else None
        seat = Seat(
            self.job,
            self.spec,
            self.signers[index],
            record=record,
            now=self.now,
            seed=1,
        )
        seat.set_members(self.ids)
        hint = PeerId(self.assignment[1]) if self.assignment[0] else None
        seat.set_joining(peer not in self.aloof, hint, self.now)
        self.seats[peer], self.sums[peer] = seat, Sums()
        self.due[peer] = self.now

    def kill(self, index: int) -> None:
        self.seats.pop(self.ids[index], None)
        self.sums.pop(self.ids[index], None)

    def partition(self, *groups: tuple[int, ...]) -> None:
        self.groups = [{self.ids[i] for i in group} for group in groups]

    def heal(self) -> None:
        self.groups, self.loss = [set(self.ids)], 0.0

    def cut(self, one: int, other: int) -> None:
        """No worker connection between two peers; their daemons still talk."""
        self.cuts.add(frozenset((self.ids[one], self.ids[other])))

    def workers_linked(self, one: PeerId, other: PeerId) -> bool:
        return self.linked(one, other) and frozenset((one, other)) not in self.cuts

    def linked(self, one: PeerId, other: PeerId) -> bool:
        alive = one in self.seats and other in self.seats
        return alive and any(one in g and other in g for g in self.groups)

    # -- messages

    def later(self, delay: float, action: Callable[[], None]) -> None:
        self.serial += 1
        heapq.heappush(self.queue, (self.now + delay, self.serial, action))

    def lost(self) -> bool:
        return self.random.random() < self.loss

    def send(self, sender: PeerId, peer: PeerId, message: Any) -> None:
        seat = self.seats[sender]
        sent_at = self.now

        def fail() -> None:
            if self.seats.get(sender) is seat:
                seat.failed(peer, message, self.now)
                self.pump(sender)

        def deliver() -> None:
            ok = self.linked(sender, peer) and not self.lost()
            if not ok or not self.before_deliver(sender, peer, message):
                self.later(max(0.0, PATIENCE / 2 - (self.now - sent_at)), fail)
                return
            other = self.seats[peer]
            wire = CODEC.decode_untrusted(CODEC.encode(message))
            reply = other.receive(sender, wire, self.now)
            self.pump(peer)
            self.later(
                self.latency * (0.5 + self.random.random()), lambda: answer(reply)
            )

        def answer(reply: Any) -> None:
            if not self.linked(sender, peer) or self.lost():
                self.later(max(0.0, PATIENCE / 2 - (self.now - sent_at)), fail)
            elif self.seats.get(sender) is seat:
                seat.replied(
                    peer, message, CODEC.decode_untrusted(CODEC.encode(reply)), self.now
                )
                self.pump(sender)

        self.later(self.latency * (0.5 + self.random.random()), deliver)

    def pump(self, peer: PeerId) -> None:
        seat = self.seats.get(peer)
        if seat is None:
            return
        outputs = seat.poll(self.now)
        for effect in outputs.effects:
            self.perform(peer, effect)
        for other, message in outputs.sends:
            self.note(message)
            self.send(peer, other, message)
        self.due[peer] = seat.next_timeout(self.now)

    def note(self, message: Any) -> None:
        """The two safety properties, checked on everything that is sent."""
        if isinstance(message, Commit):
            generation = message.generation
            known = self.commits.setdefault(generation.counter, generation)
            assert known == generation, (
                f"two generations with epoch {generation.counter}"
            )
        if isinstance(message, RoundDecision):
            key = (message.counter, message.round)
            assert self.decisions.setdefault(key, message) == message

    def perform(self, peer: PeerId, effect: Any) -> None:
        sums = self.sums[peer]
        match effect:
            case Persist():
                self.disk[peer] = RECORD.encode(effect.record)
                committed = effect.record.committed
                known = self.commits.setdefault(committed.counter, committed)
                assert known == committed, f"two generations, epoch {committed.counter}"
            case Apply():
                self.apply(peer, sums, effect.generation)
            case Retire():
                sums.generation = None
            case Decide():
                key = (effect.decision.counter, effect.decision.round)
                known_decision = self.decisions.setdefault(key, effect.decision)
                assert known_decision == effect.decision, f"two decisions of {key}"
                sums.decision = effect.decision
            case SaveState():
                root = hex_digest(sums.states[effect.round].encode())
                self.later(0.1, lambda: self.saved(peer, effect.round, root))
            case Recorded():
                self.log.append((self.now, peer, effect))
            case Diverged():
                self.diverged += effect.num_peers
            case Publish():
                if effect.generation is not None:
                    self.later(0.5, self.replicate(effect.generation))
            case Ended():
                pass

    def replicate(self, generation: Generation) -> Callable[[], None]:
        """Tell those who want a place who coordinates, as the replicated store does."""

        def tell() -> None:
            newest = (generation.counter, generation.coordinator)
            self.assignment = max(self.assignment, newest)
            for peer in self.seats.keys() - self.aloof:
                self.seats[peer].set_joining(True, PeerId(self.assignment[1]), self.now)

        return tell

    def saved(self, peer: PeerId, at: int, root: str) -> None:
        if peer in self.seats:
            self.seats[peer].saved(at, root, "", self.now)
            self.pump(peer)

    # -- time

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Advance virtual time; return whether ``until`` came true."""
        end = self.now + seconds
        step = 0.1
        while self.now < end and not until():
            horizon = self.now + step
            while self.queue and self.queue[0][0] <= horizon:
                at, _, action = heapq.heappop(self.queue)
                self.now = max(self.now, at)
                action()
            self.now = horizon
            for peer in [p for p in self.ids if p in self.seats]:
                self.step_runner(peer)
                if self.due[peer] <= self.now:
                    self.pump(peer)
        return until()

    # -- questions

    def alive(self) -> list[Seat]:
        return list(self.seats.values())

    def all_done(self) -> bool:
        return all(seat.state.value == "done" for seat in self.alive())

    def final_states(self) -> set[str | None]:
        """The last state of everybody who took part in the last generation."""
        last = self.commits[max(self.commits)].participants
        rounds = self.spec.train.outer.rounds
        return {self.sums[p].states.get(rounds) for p in last if p in self.sums}


@pytest.fixture
async def mesh(tmp_path):
    async with trio.open_nursery() as nursery:
        mesh = Mesh(nursery, tmp_path)
        for index in range(4):
            await mesh.start(index)
        yield mesh
        nursery.cancel_scope.cancel()


@pytest.fixture
def make_net() -> type[Net]:
    return Net
