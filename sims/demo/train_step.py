"""Step 2 and 3: train together, lose a peer at a random step, gain one later."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field

from fabric.app.client import Job
from fabric.app.control_messages import EventView, JobRow
from fabric.core.errors import FabricError
from fabric.core.ids import short
from fabric.jobs.spec import (
    FaultSpec,
    JobSpec,
    OuterSpec,
    RequireSpec,
    TrainSpec,
)
from sims.demo.mesh_step import NEWCOMER, PEERS, SETTINGS
from sims.demo.summary import LossPoint
from sims.demo.view import DemoView
from sims.local import LocalMesh

ROUNDS = 48
INNER_STEPS = 20
BATCH = 1
LEARNING_RATE = 4e-3
WARMUP_STEPS = 20
OUTER_LEARNING_RATE = 1.0
OUTER_MOMENTUM = 0.1
"""Found by a search over 25 settings at 492 k tokens: with few, short rounds a large
momentum overshoots, and twice the steps of half the batch halve the gap to the single
process, which has four times a peer's steps."""


@dataclass
class TrainOutcome:
    """What happened while the job ran."""

    job: str = ""
    killed: str = ""
    joined: str = ""
    entropy: float = 0.0
    curve: list[LossPoint] = field(default_factory=list)
    members: list[tuple[int, frozenset[str]]] = field(default_factory=list)
    """(first round, short ids of the participants), one per generation."""
    contributors: list[tuple[int, frozenset[str]]] = field(default_factory=list)
    """(round, short ids of those whose pseudo-gradients made it up)."""
    coordinators: set[str] = field(default_factory=set)
    tokens: int = 0
    row: JobRow | None = None


def demo_spec(seed: int, *, peers: int = len(PEERS)) -> JobSpec:
    """Return the demo's training job."""
    outer = OuterSpec(
        inner_steps=INNER_STEPS,
        rounds=ROUNDS,
        learning_rate=OUTER_LEARNING_RATE,
        momentum=OUTER_MOMENTUM,
    )
    return JobSpec(
        name="demo",
        train=TrainSpec(
            batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            warmup_steps=WARMUP_STEPS,
            seed=seed,
            outer=outer,
        ),
        require=RequireSpec(min_peers=peers),
        fault=FaultSpec(patience_seconds=5.0),
    )


class TrainStep:
    """Runs the job through the client of the first peer and follows its events.

    Args:
        mesh: The running daemons.
        view: Where progress goes.
        seed: Chooses the victim and the moment.
        victim: Whom to kill; None lets the seed choose among all but the client's.
    """

    def __init__(
        self, mesh: LocalMesh, view: DemoView, seed: int, *, victim: str | None = None
    ) -> None:
        rng = random.Random(f"demo {seed}")
        self._mesh = mesh
        self._view = view
        self._spec = demo_spec(seed)
        self._victim = victim or rng.choice(PEERS[1:])
        self._kill_round = rng.randint(ROUNDS // 8, ROUNDS // 3)
        self._kill_delay = rng.uniform(0.0, 1.5)
        self._ids = {n: short(mesh.client(n).status().peer) for n in PEERS}
        self._newcomer: threading.Thread | None = None
        self._trouble: list[FabricError] = []
        self.outcome = TrainOutcome()

    def run(self) -> TrainOutcome:
        """Train to the end; return what happened.

        Raises:
            FabricError: the job failed, or the newcomer could not join.
        """
        job = self._mesh.client(PEERS[0]).submit(self._spec)
        self.outcome.job = job.id
        self._view.say(f"submitted job {job.id[:8]} through {PEERS[0]}")
        for event in job.events():
            self._on_event(event)
        if self._newcomer is not None:
            self._newcomer.join()
        if self._trouble:
            raise self._trouble[0]
        self.outcome.row = _row_of(job)
        return self.outcome

    def _on_event(self, event: EventView) -> None:
        facts = event.facts
        match event.kind:
            case "generation":
                self._on_generation(event)
            case "round":
                self.outcome.tokens += int(facts["tokens"])
                named = frozenset(str(facts["peers"]).split(","))
                self.outcome.contributors.append((int(facts["round"]), named))
                self._on_round(int(facts["round"]) + 1)
            case "validated":
                self._on_validated(int(facts["round"]), float(facts["validation_loss"]))
            case "done":
                pass
            case other:
                self._view.say(f"{other} {facts}")

    def _on_generation(self, event: EventView) -> None:
        facts = event.facts
        members = frozenset(str(facts["peers"]).split(","))
        self.outcome.members.append((int(facts["round"]), members))
        self.outcome.coordinators.add(event.peer)
        names = {peer: name for name, peer in self._ids.items()}
        who = ", ".join(sorted(names.get(m, m) for m in members))
        self._view.say(
            f"generation {facts['counter']} from round {facts['round']}: {who}"
        )

    def _on_validated(self, at: int, loss: float) -> None:
        self.outcome.curve.append(LossPoint(self.outcome.tokens, loss))
        self._view.loss(loss, at, ROUNDS)
        self._view.say(f"round {at}: validation loss {loss:.3f} nats/byte")

    def _on_round(self, finished: int) -> None:
        if finished == self._kill_round and not self.outcome.killed:
            time.sleep(self._kill_delay)  # somewhere inside the next round
            self._mesh.kill(self._victim)
            self.outcome.killed = self._victim
            self._view.say(f"killed {self._victim} (SIGKILL)")
        elif finished == self._kill_round + 2 and self._newcomer is None:
            # beside the event loop: a daemon takes seconds to start
            self._newcomer = threading.Thread(target=self._bring_newcomer)
            self._newcomer.start()

    def _bring_newcomer(self) -> None:
        try:
            self._mesh.start(NEWCOMER, SETTINGS)
            client = self._mesh.client(NEWCOMER)
            client.join(self._mesh.client(PEERS[0]).invite(uses=1))
            self._ids[NEWCOMER] = short(client.status().peer)
            self.outcome.joined = NEWCOMER
            self._view.say(f"{NEWCOMER} joined the mesh and asks for work")
        except FabricError as error:
            self._trouble.append(error)


def _row_of(job: Job) -> JobRow:
    row = job.status()
    if row.state != "done":
        raise FabricError(f"the job {row.state}: {row.reason}", code="E_DEMO")
    return row
