"""How connected peers reach each other: relays, circuits and punches of a whole mesh.

Drives the production cores: whoever is behind a NAT chooses its relays with
:class:`nat.relay.circuit.Reservations`, relays promise and carry by
:class:`nat.relay.core.RelayBook`, and what runs over a relay is asked to become direct
when :class:`nat.punch.upgrade.UpgradeCore` says. Whether a punch crosses two NATs is
the daemon's rule :func:`nat.punch.facts.can_punch`; that it then does is a finding of
the laboratory (``make soak AREA=nat``), not of the model.

The model decides what carries a pair, not what arrives: messages are lost by
:mod:`sims.model.network` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fabric.core.ids import PeerId
from nat.punch.config import PunchConfig
from nat.punch.upgrade import UpgradeCore
from nat.relay.circuit import Action, Probe, Reservations
from nat.relay.config import CircuitConfig, RelayConfig
from nat.relay.core import Circuit, Refusal, RelayBook
from sims.engine.queue import Engine
from sims.model.network import Network
from sims.peers.mesh import Mesh
from sims.peers.node import Node
from sims.report.report import PathFigures

_LOOK_SECONDS = 0.5
"""The daemon looks for missing connections this often."""
_PUNCH_ROUND_TRIPS = 3
"""CONNECT, SYNC and the SYNs."""


@dataclass
class _Path:
    since: float
    kind: str = ""
    relay: int = -1
    circuit: Circuit | None = None


class _Host:
    """What one process of a peer has for its paths."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.generation = node.generation
        self.reservations = Reservations(CircuitConfig())
        self.book = RelayBook(RelayConfig())
        self.upgrades = UpgradeCore(PunchConfig().retry_seconds)
        self.paths: dict[PeerId, _Path] = {}
        """To connected peers with a greater number: who dials keeps the path."""


class Traversal:
    """The paths of all peers.

    Args:
        engine: Virtual time.
        network: Who is up, and behind which NAT.
        mesh: The peers and their connections.

    Attributes:
        num_calls: Calls into the cores.
    """

    def __init__(self, engine: Engine, network: Network, mesh: Mesh) -> None:
        self._engine = engine
        self._network = network
        self._mesh = mesh
        self._hosts: dict[int, _Host] = {}
        self._waits: list[float] = []
        self._most_circuits = 0
        self.num_calls = 0

    def look(self) -> None:
        """Have every peer that is up see to its relays and paths; again and again."""
        self._forget_the_gone()
        public = [n for n in self._mesh.nodes if self._relays(n.number)]
        for node in self._mesh.nodes:
            if self._network.online[node.number]:
                host = self._host(node)
                if not self._network.is_public(node.number):
                    self._keep_reservations(host, public)
                self._keep_paths(host)
                self._upgrade(host)
        self._engine.after(_LOOK_SECONDS, self.look)

    def _relays(self, number: int) -> bool:
        return self._network.online[number] and self._network.is_public(number)

    def _host(self, node: Node) -> _Host:
        host = self._hosts.get(node.number)
        if host is None or host.generation != node.generation:
            host = self._hosts[node.number] = _Host(node)
        return host

    def _forget_the_gone(self) -> None:
        for number, host in list(self._hosts.items()):
            gone = host.generation != host.node.generation
            if gone or not self._network.online[number]:
                for path in host.paths.values():
                    self._release(path)
                del self._hosts[number]

    # --- relays

    def _keep_reservations(self, host: _Host, public: list[Node]) -> None:
        now, core = self._engine.now, host.reservations
        reached = {n.peer: n for n in public if self._linked(host, n)}
        for status in core.status():
            if status.held and status.relay not in reached:
                core.on_lost(status.relay, now)
        core.set_candidates({p: (_address(n),) for p, n in reached.items()})
        self.num_calls += 1
        for action in core.actions(now):
            self._act(host, action)

    def _act(self, host: _Host, action: Action) -> None:
        number = self._mesh.numbers[action.relay]
        there = self._network.delay(host.node.number, number, 0)
        done = partial(self._acted, host, action, self._engine.now)
        self._engine.after(2 * there, done)

    def _acted(self, host: _Host, action: Action, began: float) -> None:
        relay, now = (
            self._mesh.nodes[self._mesh.numbers[action.relay]],
            self._engine.now,
        )
        if not self._linked(host, relay):
            host.reservations.on_failed(relay.peer, "it is gone", now)
        elif isinstance(action, Probe):
            host.reservations.on_probed(relay.peer, now - began)
        else:
            self._reserve(host, relay, now)

    def _reserve(self, host: _Host, relay: Node, now: float) -> None:
        book, node = self._host(relay).book, host.node
        self.num_calls += 1
        life = book.reserve(node.peer, _ip(node), member=True, now=now)
        if isinstance(life, Refusal):
            host.reservations.on_failed(relay.peer, life.reason, now)
            return
        limit = book.limit(members=True)
        addrs = (f"{_address(relay)}/p2p/{relay.peer}",)
        host.reservations.on_reserved(relay.peer, life, addrs, limit, now)

    def _linked(self, host: _Host, other: Node) -> bool:
        return host.node is not other and self._network.linked(
            host.node.number, other.number
        )

    # --- paths

    def _keep_paths(self, host: _Host) -> None:
        wanted = {
            peer
            for peer in self._mesh.connected(host.node)
            if self._mesh.numbers[peer] > host.node.number
        }
        for peer in [peer for peer in host.paths if peer not in wanted]:
            self._release(host.paths.pop(peer))
        for peer in sorted(wanted):
            path = host.paths.setdefault(peer, _Path(self._engine.now))
            if path.kind == "relay" and not self._carried(host, path, peer):
                self._release(path)
                path.kind, path.since = "", self._engine.now
            if not path.kind:
                self._open(host, path, self._mesh.nodes[self._mesh.numbers[peer]])

    def _carried(self, host: _Host, path: _Path, peer: PeerId) -> bool:
        """Return whether the relay of ``path`` still is there for both."""
        ends = host.node.number, self._mesh.numbers[peer]
        relay = self._hosts.get(path.relay)
        there = relay is not None and path.circuit in relay.book.circuits
        return there and all(self._network.linked(e, path.relay) for e in ends)

    def _open(self, host: _Host, path: _Path, other: Node) -> None:
        if self._network.path_kind(host.node.number, other.number) == "direct":
            path.kind = "direct"
            return
        for at, target in ((host, other), (self._host(other), host.node)):
            if self._through_relay(at, target, path):
                self._waits.append(self._engine.now - path.since)
                return

    def _through_relay(self, source: _Host, target: Node, path: _Path) -> bool:
        """Ask the relays that hold a reservation of ``target``, the nearest first."""
        reservations = self._host(target).reservations
        held = [s for s in reservations.status() if s.held]
        for status in sorted(held, key=lambda s: s.rtt_seconds or 0.0):
            number = self._mesh.numbers[status.relay]
            relay = self._mesh.nodes[number]
            if relay is source.node or not self._linked(source, relay):
                continue
            book = self._host(relay).book
            self.num_calls += 1
            circuit = book.connect(
                source.node.peer, target.peer, members=True, now=self._engine.now
            )
            if isinstance(circuit, Circuit):
                path.kind, path.relay, path.circuit = "relay", number, circuit
                self._most_circuits = max(self._most_circuits, len(book.circuits))
                return True
        return False

    def _release(self, path: _Path) -> None:
        relay = self._hosts.get(path.relay)
        circuit = path.circuit
        if circuit and relay is not None and circuit in relay.book.circuits:
            relay.book.release(circuit)
        path.circuit, path.relay = None, -1

    # --- upgrades

    def _upgrade(self, host: _Host) -> None:
        core, now = host.upgrades, self._engine.now
        relayed = frozenset(p for p, path in host.paths.items() if path.kind == "relay")
        core.update(relayed)
        self.num_calls += 1
        for peer in core.start(now):
            number = self._mesh.numbers[peer]
            there = self._network.delay(host.node.number, number, 0)
            self._engine.after(
                2 * there * _PUNCH_ROUND_TRIPS, self._upgraded, host, peer, number
            )

    def _upgraded(self, host: _Host, peer: PeerId, number: int) -> None:
        now, path = self._engine.now, host.paths.get(peer)
        if path is None or path.kind != "relay":
            host.upgrades.ended(peer, now, failure="its path is gone")
        elif self._network.path_kind(host.node.number, number) == "relay":
            host.upgrades.ended(peer, now, failure="both NATs refuse", may_pass=False)
        else:
            host.upgrades.ended(peer, now)
            self._release(path)
            path.kind = "punched"
            self._mesh.log.write(now, f"punched {host.node.number} with={number}")

    # --- the end

    def unfinished(self) -> str:
        """Return which pairs are not reached as directly as can be, or ""."""
        found = self.figures()
        if found.without:
            return f"{found.without} pairs have no path"
        late = found.needlessly_relayed
        return f"{late} pairs could be direct and are relayed" if late else ""

    def figures(self) -> PathFigures:
        """Return how the peers reach each other now, and how long that took."""
        paths = [
            (path, self._network.path_kind(number, self._mesh.numbers[peer]))
            for number, host in self._hosts.items()
            for peer, path in host.paths.items()
        ]
        waits = sorted(self._waits) or [0.0]
        return PathFigures(
            direct=sum(path.kind == "direct" for path, _ in paths),
            punched=sum(path.kind == "punched" for path, _ in paths),
            relayed=sum(path.kind == "relay" for path, _ in paths),
            without=sum(not path.kind for path, _ in paths),
            needlessly_relayed=sum(
                path.kind == "relay" and possible != "relay" for path, possible in paths
            ),
            relayed_after_p50=round(waits[len(waits) // 2], 3),
            relayed_after_max=round(waits[-1], 3),
            most_circuits=self._most_circuits,
        )


def _ip(node: Node) -> str:
    return f"10.{node.number >> 8}.{node.number & 255}.1"


def _address(node: Node) -> str:
    return f"/ip4/{_ip(node)}/tcp/4001"
