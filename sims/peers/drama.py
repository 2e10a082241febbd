"""What happens to the peers of a run: writes, attacks, faults, and the end of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from crdt_store.administration import Administration
from crdt_store.entry import Entry
from crdt_store.grants import CODEC, GRANT_PREFIX, Grant
from crdt_store.messages import PUSH, Push
from crdt_store.reconcile import parse_request_untrusted
from crdt_store.roles import Role
from fabric.core.errors import RemoteProtocolError
from sims.engine.queue import Engine
from sims.model.attacks import KINDS, Attacker
from sims.model.scenario import Scenario
from sims.peers.churn import Churn
from sims.peers.mesh import Mesh
from sims.peers.node import Node

_ADMISSION_SECONDS = 0.2
_TTL_SHARE = 0.1
_RETRY_SECONDS = 1.0


@dataclass
class Drama:
    """Plans the faults of a scenario.

    Attributes:
        scenario: What may happen.
        engine: Virtual time.
        mesh: The peers.
        attacker: Makes hostile messages.
        stream: Randomness by purpose.
        late: Numbers of peers that are admitted during the run.
        num_attacks: Sent so far.
        revoked: Peers revoked so far.
    """

    scenario: Scenario
    engine: Engine
    mesh: Mesh
    attacker: Attacker
    stream: Callable[[str], random.Random]
    late: frozenset[int]
    num_attacks: int = 0

    def __post_init__(self) -> None:
        self.revoked: set[int] = set()
        self._serial = 0

    @property
    def _end(self) -> float:
        return self.scenario.fault_seconds

    @property
    def _owner(self) -> Node:
        return self.mesh.nodes[0]

    def plan(self) -> None:
        """Put everything that will happen on the queue."""
        self._plan_writes()
        self._plan_partitions()
        self._plan_restarts()
        self._plan_trust()
        self._plan_clocks()
        Churn(
            self.scenario,
            self.engine,
            self.mesh,
            self.stream("churn"),
            self.kill,
            self.restart,
        ).plan()
        self.engine.at(self._end, self._heal)

    def _live(self) -> list[Node]:
        online = self.mesh.network.online
        return [node for node in self.mesh.nodes if online[node.number]]

    # --- writes and attacks

    def _plan_writes(self) -> None:
        terms, rng = self.scenario.writes, self.stream("writes")
        if terms.total:
            for _ in range(terms.total):
                self.engine.at(rng.random() * self._end, self._write, rng, False)
        elif terms.per_second:
            self.engine.after(rng.expovariate(terms.per_second), self._write, rng, True)

    def _write(self, rng: random.Random, again: bool) -> None:
        terms = self.scenario.writes
        writers = self._live()
        if writers:
            node = rng.choice(writers)
            slot = rng.randrange(terms.slots)
            shared = rng.random() < 1 / 4
            key = f"c/sim/{slot}" if shared else f"p/{slot}/{node.peer}"
            ttl = rng.randint(30, 300) if rng.random() < _TTL_SHARE else 0
            self._serial += 1
            value = self._serial.to_bytes(4, "big") + rng.randbytes(terms.bytes)
            self.mesh.write(node, key, value[: terms.bytes], ttl)
            if rng.random() < self.scenario.trust.attack_share:
                self._attack(rng)
        if again and self.engine.now < self._end:
            self.engine.after(rng.expovariate(terms.per_second), self._write, rng, True)

    def _attack(self, rng: random.Random) -> None:
        kind = rng.choice(KINDS)
        self.num_attacks += 1
        self.mesh.log.write(self.engine.now, f"attack {kind}")
        live = self._live()
        wall = live[0].wall(self.engine.now) - live[0].skew
        for raw in self.attacker.messages(kind, wall):
            if rng.random() < 1 / 2:  # by gossip
                hostile = kind == "garbage" and rng.random() < 1 / 2
                payload = raw if hostile else PUSH.encode(Push((raw,)))
                self.mesh.publish_untrusted(rng.choice(live), payload)
            else:  # in a reconciliation
                target = rng.choice(live)
                target.take_in_untrusted([raw], self.engine.now, live=True)
        if kind == "garbage":
            try:
                parse_request_untrusted(rng.randbytes(rng.randrange(200)))
            except RemoteProtocolError:
                self.mesh.log.write(self.engine.now, "refused garbage")

    # --- faults

    def _plan_partitions(self) -> None:
        terms, rng = self.scenario.partitions, self.stream("partitions")
        if terms.every_seconds:
            self.engine.after(terms.every_seconds, self._redraw, rng)
        if terms.for_seconds:
            self.engine.at(terms.at_seconds, self._divide, rng, 2)
            healed = terms.at_seconds + terms.for_seconds
            self.engine.at(healed, self._divide, rng, 1)

    def _redraw(self, rng: random.Random) -> None:
        if self.engine.now >= self._end:
            return
        terms = self.scenario.partitions
        self._divide(rng, rng.randint(1, terms.groups))
        self.engine.after(terms.every_seconds, self._redraw, rng)

    def _divide(self, rng: random.Random, sides: int) -> None:
        chosen = [rng.randrange(sides) for _ in self.mesh.nodes]
        self.mesh.network.divide(chosen)
        self.mesh.log.write(self.engine.now, f"divide {''.join(map(str, chosen))}")
        self.mesh.look_soon()

    def _plan_restarts(self) -> None:
        rate, rng = self.scenario.churn.restart_rate, self.stream("restarts")
        if rate:
            mean = 3600 / (rate * len(self.mesh.nodes))
            self.engine.after(rng.expovariate(1 / mean), self._crash, rng, mean)

    def _crash(self, rng: random.Random, mean: float) -> None:
        if self.engine.now >= self._end:
            return
        node = rng.choice(self._live() or self.mesh.nodes)
        self.kill(node)
        down = self.scenario.churn.down_seconds * (0.5 + rng.random())
        self.engine.after(down, self.restart, node)
        self.engine.after(rng.expovariate(1 / mean), self._crash, rng, mean)

    def kill(self, node: Node) -> None:
        """End ``node`` at once, if it runs."""
        if self.mesh.network.online[node.number]:
            self.mesh.offline(node)

    def restart(self, node: Node) -> None:
        """Bring ``node`` back from its disk, if it is down."""
        if not self.mesh.network.online[node.number]:
            node.start(self.engine.now, self.mesh.num_members)
            self.mesh.online(node)
            self.mesh.look_soon()

    def _plan_clocks(self) -> None:
        terms, rng = self.scenario.clocks, self.stream("clocks")
        for _ in range(terms.jumps):
            self.engine.at(rng.random() * self._end, self._jump, rng)

    def _jump(self, rng: random.Random) -> None:
        node = rng.choice(self.mesh.nodes)
        terms = self.scenario.clocks
        node.skew = (2 * rng.random() - 1) * terms.jump_seconds
        self.mesh.log.write(self.engine.now, f"clock {node.number} {node.skew:+.3f}")

    # --- authority

    def _plan_trust(self) -> None:
        rng = self.stream("trust")
        for number in sorted(self.late):
            self.engine.at(rng.random() * self._end * 0.8, self._grant, number)
        founders = [n.number for n in self.mesh.nodes[1:] if n.number not in self.late]
        count = min(self.scenario.trust.revocations, max(0, len(founders) - 2))
        for number in rng.sample(founders, count):
            at = (0.3 + 0.6 * rng.random()) * self._end
            self.engine.at(at, self._revoke, number)

    def _grant(self, number: int) -> None:
        """Admit a peer; it shows its grant to nobody but carries it from the owner."""
        owner, node = self._owner, self.mesh.nodes[number]
        if not self.mesh.network.online[owner.number]:
            self.engine.after(_RETRY_SECONDS, self._grant, number)
            return
        value = CODEC.encode(Grant(Role.WORKER))
        self.mesh.write(owner, GRANT_PREFIX + node.peer, value)
        self.mesh.num_members += 1
        self.engine.after(_ADMISSION_SECONDS, self._admit, node, owner.generation)

    def _admit(self, node: Node, generation: int) -> None:
        owner, now = self._owner, self.engine.now
        if owner.generation != generation:
            self._grant(node.number)  # the owner died before it answered
            return
        self.restart(node)
        authority = owner.replica.authority_entries()
        node.take_in_untrusted(authority, now, live=False)

    def _revoke(self, number: int) -> None:
        owner = self._owner
        if not self.mesh.network.online[owner.number]:
            self.engine.after(_RETRY_SECONDS, self._revoke, number)
            return
        self.revoked.add(number)
        self.mesh.gate.watch(self.mesh.nodes[number])
        admin = Administration(
            owner.mesh,
            owner.replica.slots,
            owner.replica.authority,
            owner.signer,
            self._put_as_owner,
            lambda: owner.wall(self.engine.now),
        )
        step = admin.revoke(self.mesh.nodes[number].peer, "simulated")
        try:
            step.send(None)  # it waits for nothing but our put
        except StopIteration:
            return
        raise AssertionError("a revocation waited for something")

    async def _put_as_owner(self, key: str, value: bytes, ttl_seconds: int) -> Entry:
        reason = self.mesh.write(self._owner, key, value, ttl_seconds)
        assert not reason, reason
        return self._owner.uncommitted[-1]

    # --- the end of all faults

    def _heal(self) -> None:
        terms = self.mesh.network.terms
        self.mesh.network.terms = msgspec.structs.replace(
            terms, drop=0.0, duplicate=0.0, reorder=0.0, cut_sessions=0.0
        )
        self.mesh.network.divide([0] * len(self.mesh.nodes))
        for node in self.mesh.nodes:
            self.restart(node)
        self.mesh.log.write(self.engine.now, "healed")
        self.mesh.look_soon()
