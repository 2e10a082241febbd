"""A serving job on simulated peers: who leads, when leaders die and networks split.

Drives the production :class:`fabric.jobs.seat.Seat` of each participant: elections,
generations and fencing. What replication carries for a job (who coordinates) goes
through the simulated store. Checked on everything sent or promised: no two generations
share an epoch.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from fabric.core.ids import JobId, PeerId
from fabric.jobs.effects import Effect, Persist, Publish
from fabric.jobs.messages import CODEC, Commit, Generation, JobMessage
from fabric.jobs.promises import RECORD
from fabric.jobs.seat import Seat
from fabric.jobs.spec import FaultSpec, JobSpec, RequireSpec, ServeSpec, job_id
from sims.engine.queue import Engine
from sims.model.frames import call_bytes, response_bytes
from sims.model.network import Network
from sims.peers.mesh import Mesh
from sims.peers.node import Node

_METHOD = "jobs.message"
_LOOK_SECONDS = 1.0
_PATIENCE_SECONDS = 4.0
_STANDING_BY = 2
"""Participants beyond the stages: they take the place of whoever is lost."""


class _Published(msgspec.Struct, frozen=True, array_like=True):
    counter: int
    coordinator: PeerId


_PUBLISHED = msgspec.msgpack.Decoder(_Published)


class Committee:
    """The seats of one job.

    Args:
        engine: Virtual time.
        network: Carries their messages.
        mesh: The peers; the first ``size`` take part.
        size: How many.
        rng: Back-off seeds.

    Attributes:
        generations: Committed ones by epoch.
        violations: Epochs with two generations, in words.
        num_calls: Calls into seats.
    """

    def __init__(
        self,
        engine: Engine,
        network: Network,
        mesh: Mesh,
        size: int,
        rng: random.Random,
    ) -> None:
        self._engine = engine
        self._network = network
        self._mesh = mesh
        self._size = size
        self._rng = rng
        self._spec = JobSpec(
            kind="serve",
            serve=ServeSpec(stages=max(1, size - _STANDING_BY), checkpoint="root"),
            require=RequireSpec(min_peers=1),
            fault=FaultSpec(patience_seconds=_PATIENCE_SECONDS),
            submitter=mesh.nodes[0].peer,
            nonce="simulated",
        )
        self._job: JobId = job_id(self._spec)
        self._key = f"a/{self._job[:32]}/leader"
        self._seats: dict[int, tuple[int, Seat]] = {}
        self._disks: dict[int, bytes] = {}
        self._planned: dict[int, float] = {}
        self.generations: dict[int, Generation] = {}
        self.violations: list[str] = []
        self.num_calls = 0

    def look(self) -> None:
        """Open seats of peers that came up; tell all who leads, as the store says."""
        for node in self._mesh.nodes[: self._size]:
            if self._network.online[node.number]:
                seat = self._seat(node) or self._open(node)
                seat.set_joining(True, self._leader_seen_by(node), self._engine.now)
                self._pump(node, node.generation)
        self._engine.after(_LOOK_SECONDS, self.look)

    def _seat(self, node: Node) -> Seat | None:
        generation, seat = self._seats.get(node.number, (-1, None))
        return seat if generation == node.generation else None

    def _open(self, node: Node) -> Seat:
        raw = self._disks.get(node.number)
        seat = Seat(
            self._job,
            self._spec,
            node.signer,
            record=RECORD.decode_untrusted(raw) if raw else None,
            now=self._engine.now,
            seed=self._rng.randrange(1 << 30),
        )
        seat.set_members(n.peer for n in self._mesh.nodes[: self._size])
        self._seats[node.number] = node.generation, seat
        self._planned.pop(node.number, None)
        return seat

    def _leader_seen_by(self, node: Node) -> PeerId | None:
        found = [
            _PUBLISHED.decode(entry.value) for entry in node.replica.slots.at(self._key)
        ]
        best = max(found, key=lambda p: p.counter, default=None)
        return best.coordinator if best else None

    def leader(self) -> Node | None:
        """Return who coordinates and may act."""
        for node in self._mesh.nodes[: self._size]:
            seat = self._seat(node)
            if seat is not None and seat.coordinates:
                return node
        return None

    # --- driving a seat

    def _pump(self, node: Node, generation: int) -> None:
        seat = self._seat(node)
        if seat is None or node.generation != generation:
            return
        self.num_calls += 1
        outputs = seat.poll(self._engine.now)
        for effect in outputs.effects:
            self._perform(node, effect)
        for peer, message in outputs.sends:
            if isinstance(message, Commit):
                self._note(message.generation)
            self._send(node, peer, message)
        when = seat.next_timeout(self._engine.now)
        if self._engine.now < self._planned.get(node.number, -1.0) <= when:
            return
        self._planned[node.number] = when
        self._engine.at(when, self._pump, node, generation)

    def _perform(self, node: Node, effect: Effect) -> None:
        if isinstance(effect, Persist):
            self._disks[node.number] = RECORD.encode(effect.record)
            self._note(effect.record.committed)
        elif isinstance(effect, Publish) and effect.generation is not None:
            newest = effect.generation
            value = _Published(newest.counter, newest.coordinator)
            self._mesh.write(node, self._key, msgspec.msgpack.encode(value))

    def _note(self, generation: Generation) -> None:
        known = self.generations.get(generation.counter)
        if known is None:
            self.generations[generation.counter] = generation
            self._mesh.log.write(
                self._engine.now,
                f"generation {generation.counter}"
                f" leader={self._mesh.numbers.get(generation.coordinator, -1)}"
                f" participants={len(generation.participants)}",
            )
        elif known != generation:
            self.violations.append(f"two generations with epoch {generation.counter}")

    # --- messages

    def _send(self, node: Node, peer: PeerId, message: JobMessage) -> None:
        data = CODEC.encode(message)
        self._network.send(
            node.number,
            self._mesh.numbers[peer],
            "jobs",
            call_bytes(len(data), _METHOD),
            self._serve_untrusted,
            self._lost,
            node,
            node.generation,
            peer,
            message,
            data,
        )

    def _lost(
        self,
        node: Node,
        generation: int,
        peer: PeerId,
        message: JobMessage,
        data: bytes,
    ) -> None:
        late = _PATIENCE_SECONDS / 2
        self._engine.after(late, self._failed, node, generation, peer, message)

    def _failed(
        self, node: Node, generation: int, peer: PeerId, message: JobMessage
    ) -> None:
        seat = self._seat(node)
        if seat is not None and node.generation == generation:
            seat.failed(peer, message, self._engine.now)
            self._pump(node, generation)

    def _serve_untrusted(
        self,
        node: Node,
        generation: int,
        peer: PeerId,
        message: JobMessage,
        data: bytes,
    ) -> None:
        partner = self._mesh.nodes[self._mesh.numbers[peer]]
        seat = self._seat(partner)
        if seat is None:
            self._lost(node, generation, peer, message, data)
            return
        wire = CODEC.decode_untrusted(data)
        reply = CODEC.encode(seat.receive(node.peer, wire, self._engine.now))
        self._pump(partner, partner.generation)  # effects first, then the answer
        self._network.send(
            partner.number,
            node.number,
            "jobs",
            response_bytes(len(reply)),
            self._replied_untrusted,
            self._lost,
            node,
            generation,
            peer,
            message,
            reply,
        )

    def _replied_untrusted(
        self,
        node: Node,
        generation: int,
        peer: PeerId,
        message: JobMessage,
        data: bytes,
    ) -> None:
        seat = self._seat(node)
        if seat is not None and node.generation == generation:
            reply = CODEC.decode_untrusted(data)
            seat.replied(peer, message, reply, self._engine.now)
            self._pump(node, generation)

    # --- the end

    def unfinished(self) -> str:
        """Return why the job does not run as it should, or ""."""
        if not self.generations:
            return "no generation was ever committed"
        newest = self.generations[max(self.generations)]
        nodes = [self._mesh.nodes[self._mesh.numbers[p]] for p in newest.participants]
        wanted = self._spec.serve.stages
        if len(nodes) != wanted:
            return f"{len(nodes)} of {wanted} stages have a peer"
        seats = [self._seat(node) for node in nodes]
        if not all(seat is not None and seat.committed == newest for seat in seats):
            return "not every participant knows the newest generation"
        return ""


def plan_kills(
    committee: Committee,
    engine: Engine,
    kill: Callable[[Node], None],
    restart: Callable[[Node], None],
    times: list[float],
    down_seconds: float,
) -> None:
    """Kill whoever leads at each of ``times``; it comes back later."""

    def strike() -> None:
        leader = committee.leader()
        if leader is not None:
            kill(leader)
            engine.after(down_seconds, restart, leader)

    for when in times:
        engine.at(when, strike)
