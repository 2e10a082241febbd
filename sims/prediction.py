"""What the simulator predicts for the writes of one daemon, to compare with real ones.

Invites are used as writes because any client can have a daemon make them, one entry
each, and every member's list of trust shows when they arrived.
"""

from __future__ import annotations

import msgspec

from crdt_store.config import StoreConfig
from crdt_store.invites import make_invite
from sims.engine.queue import Engine
from sims.model.scenario import Scenario
from sims.peers.ledger import state_hash
from sims.peers.node import Node
from sims.simulate import Simulation

_WARM_SECONDS = 20.0
_LOOK_SECONDS = 0.005
_LONGEST_SPREAD_SECONDS = 30.0


class Prediction(msgspec.Struct, frozen=True):
    """What all peers together do about the writes.

    Attributes:
        bytes_per_write: Sent by all for each write, beyond what they send when idle.
        spread_seconds: From the acknowledgement of a lone write until all have it.
    """

    bytes_per_write: float
    spread_seconds: float


def predict(
    peers: int, writes: int, every_seconds: float, store: StoreConfig, seed: int = 1
) -> Prediction:
    """Return the cost and the spread of ``writes`` invites by the mesh's owner."""
    scenario = Scenario(
        nodes=peers,
        converged_start=True,
        liveness=True,
        fault_seconds=_WARM_SECONDS + every_seconds * writes + 1.0,
        store=store,
    )
    quiet, _ = _run(scenario, 0, every_seconds, seed)
    busy, spread = _run(scenario, writes, every_seconds, seed)
    return Prediction((busy - quiet) / writes, spread)


def _run(
    scenario: Scenario, writes: int, every_seconds: float, seed: int
) -> tuple[int, float]:
    simulation = Simulation(scenario, seed)
    simulation.prepare()
    engine, owner = simulation.engine, simulation.mesh.nodes[0]
    engine.run(_WARM_SECONDS)
    before = sum(simulation.network.sent)
    for at in range(writes):
        when = _WARM_SECONDS + at * every_seconds
        engine.at(when, _invite, simulation, owner, engine)
    engine.run(scenario.fault_seconds)
    sent = sum(simulation.network.sent) - before
    return sent, _spread(simulation, owner) if writes else 0.0


def _invite(simulation: Simulation, owner: Node, engine: Engine) -> None:
    _, entry = make_invite(
        owner.signer, owner.mesh, (), ttl_seconds=86400, now=owner.wall(engine.now)
    )
    simulation.mesh.write(owner, entry.key, entry.value)


def _spread(simulation: Simulation, owner: Node) -> float:
    """Return how long one more write takes to reach everybody, once it is on disk."""
    engine = simulation.engine
    _invite(simulation, owner, engine)
    engine.run(engine.now + owner.config.commit_batch_seconds)
    started = engine.now
    while engine.now < started + _LONGEST_SPREAD_SECONDS:
        if len({state_hash(node) for node in simulation.mesh.nodes}) == 1:
            break
        engine.run(engine.now + _LOOK_SECONDS)
    return engine.now - started
