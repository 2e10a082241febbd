"""Who is there: the shell around the production core of liveness.

Words left with silent peers wait as the daemon's do; a call that is lost fails at its
deadline.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial

from crdt_store.liveness.config import LivenessConfig
from crdt_store.liveness.core import Call, Swim
from crdt_store.liveness.messages import (
    CODEC,
    METHOD,
    Ack,
    Ping,
    check_alive,
    decode_untrusted,
    sign_alive,
)
from crdt_store.liveness.service import INCARNATIONS_PER_START
from fabric.core.ids import PeerId
from sims.engine.queue import Engine
from sims.model.frames import call_bytes, response_bytes
from sims.model.network import Network
from sims.peers.node import Node

_Answer = Callable[[Ack | None], None]


class Vitals:
    """The liveness of every peer of a run.

    Args:
        engine: Virtual time.
        network: Carries probes.
        nodes: The peers.
        numbers: Their numbers by PeerId.
        stream: Randomness by purpose.

    Attributes:
        num_calls: Calls into the core.
    """

    def __init__(
        self,
        engine: Engine,
        network: Network,
        nodes: list[Node],
        numbers: dict[PeerId, int],
        stream: Callable[[str], random.Random],
    ) -> None:
        self._engine = engine
        self._network = network
        self._nodes = nodes
        self._numbers = numbers
        self._stream = stream
        self._config = LivenessConfig()
        self._swims: dict[int, Swim] = {}
        self._starts: dict[int, int] = {}
        self._planned: dict[int, float] = {}
        self._connected: dict[int, frozenset[PeerId]] = {}
        self._vows: dict[tuple[PeerId, int, bytes], bool] = {}
        self.num_calls = 0

    def start(
        self,
        node: Node,
        members: Iterable[PeerId],
        neighbours: frozenset[PeerId] | None,
    ) -> None:
        """Begin to watch ``members`` as ``node``, which just came up.

        Args:
            node: Who.
            members: Of the mesh.
            neighbours: Whom to probe; None: all members.
        """
        starts = self._starts.get(node.number, 0) + 1
        self._starts[node.number] = starts
        swim = Swim(
            node.peer,
            self._config,
            self._stream(f"swim-{node.number}-{starts}"),
            incarnation=starts * INCARNATIONS_PER_START,
            sign=partial(sign_alive, node.signer, node.mesh.id),
            verify=partial(self._verify, node),
            now=self._engine.now,
        )
        swim.set_members(members)
        swim.set_neighbours(neighbours)
        self._swims[node.number] = swim
        self._connected[node.number] = frozenset()
        self._planned[node.number] = -1.0
        self._poll(node, node.generation)

    def _verify(
        self, node: Node, peer: PeerId, incarnation: int, signature: bytes
    ) -> bool:
        vow = peer, incarnation, signature
        known = self._vows.get(vow)
        if known is None:
            known = check_alive(node.mesh.id, peer, incarnation, signature)
            self._vows[vow] = known
        return known

    def set_members(self, node: Node, members: Iterable[PeerId]) -> None:
        """Tell ``node`` who is a member now."""
        self._swims[node.number].set_members(members)

    def look(
        self,
        node: Node,
        connected: frozenset[PeerId],
        neighbours: frozenset[PeerId] | None,
    ) -> None:
        """Tell ``node`` whom it is connected with now, and whom to probe."""
        before = self._connected[node.number]
        if connected is before:
            return
        self._connected[node.number] = connected
        swim, now = self._swims[node.number], self._engine.now
        swim.set_neighbours(neighbours)
        for peer in sorted(connected - before):
            swim.connected(peer, now)
        if swim.has_more:
            self._poll(node, node.generation)

    def broke(self, node: Node, by: Iterable[PeerId]) -> None:
        """Tell those who had a connection with ``node`` that it broke."""
        for peer in sorted(by):
            number = self._numbers[peer]
            if self._network.online[number] and number in self._swims:
                self._swims[number].broke(node.peer)

    def dead(self, node: Node) -> frozenset[PeerId]:
        """Return whom ``node`` takes for dead."""
        return self._swims[node.number].dead

    def bound_seconds(self, num_members: int) -> float:
        """Return after which time nobody may believe in a ghost any more."""
        return self._config.ghost_bound_seconds(num_members)

    # --- polling

    def _poll(self, node: Node, generation: int) -> None:
        if node.generation != generation:
            return
        swim, now = self._swims[node.number], self._engine.now
        self.num_calls += 1
        for call in swim.poll(now):
            answered = partial(self._answered, node, generation, call)
            self._ask(node, call, answered)
        swim.take_changes()  # nobody watches
        self._plan(node, generation, swim.next_timeout())

    def _plan(self, node: Node, generation: int, when: float) -> None:
        planned = self._planned[node.number]
        if self._engine.now < planned <= when:
            return
        self._planned[node.number] = when
        self._engine.at(when, self._wake, node, generation, when)

    def _wake(self, node: Node, generation: int, planned: float) -> None:
        if self._planned[node.number] == planned:
            self._poll(node, generation)

    # --- calls

    def _ask(self, node: Node, call: Call, answered: _Answer) -> None:
        data = CODEC.encode(call.ping)
        self._network.send(
            node.number,
            self._numbers[call.peer],
            "liveness",
            call_bytes(len(data), METHOD),
            self._serve_untrusted,
            self._silent,
            node,
            call,
            answered,
            data,
        )

    def _silent(self, node: Node, call: Call, answered: _Answer, data: bytes) -> None:
        self._engine.at(call.deadline, answered, None)

    def _answered(
        self, node: Node, generation: int, call: Call, ack: Ack | None
    ) -> None:
        if node.generation != generation:
            return
        swim, now = self._swims[node.number], self._engine.now
        self.num_calls += 1
        if ack is not None:
            swim.answered(call, ack, now)
        else:
            swim.failed(call, now)
        if swim.has_more:
            self._poll(node, generation)

    def _serve_untrusted(
        self, node: Node, call: Call, answered: _Answer, data: bytes
    ) -> None:
        """``call.peer`` gets the ping of ``node``."""
        partner = self._nodes[self._numbers[call.peer]]
        swim = self._swims.get(partner.number)
        ping = decode_untrusted(data)
        assert isinstance(ping, Ping)
        if swim is None:
            self._silent(node, call, answered, data)
            return
        self.num_calls += 1
        reply = swim.receive(node.peer, ping, self._engine.now)
        back = partial(self._reply, partner, node, call, answered)
        if isinstance(reply, Call):
            relayed = partial(self._relayed, partner, node.peer, reply, back)
            self._ask(partner, reply, relayed)
        else:
            back(reply)
        if swim.has_more:
            self._poll(partner, partner.generation)

    def _relayed(
        self,
        partner: Node,
        asker: PeerId,
        call: Call,
        back: Callable[[Ack], None],
        ack: Ack | None,
    ) -> None:
        swim = self._swims[partner.number]
        back(swim.relayed(asker, call, ack, self._engine.now))

    def _reply(
        self, partner: Node, node: Node, call: Call, answered: _Answer, ack: Ack
    ) -> None:
        data = CODEC.encode(ack)
        self._network.send(
            partner.number,
            node.number,
            "liveness",
            response_bytes(len(data)),
            self._deliver_untrusted,
            self._silent,
            node,
            call,
            answered,
            data,
        )

    def _deliver_untrusted(
        self, node: Node, call: Call, answered: _Answer, data: bytes
    ) -> None:
        ack = decode_untrusted(data)
        assert isinstance(ack, Ack)
        if self._engine.now <= call.deadline:
            answered(ack)
        else:
            answered(None)
