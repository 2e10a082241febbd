"""Any order of crashes, partitions, losses, slowness and cuts: safety, then progress.

``JOBS_EXAMPLES`` and ``JOBS_STEPS`` raise the counts for a soak run.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from fabric.jobs.messages import Setting

PEERS = 5
PROGRESS = 900.0
"""Virtual seconds: six rounds with a stall each, and the wait at the end."""


@pytest.fixture
def machine(make_net):
    class Faults(RuleBasedStateMachine):
        """Net itself asserts: one generation per epoch, one decision per round."""

        @initialize(
            seed=st.integers(0, 2**16),
            rounds=st.integers(2, 6),
            min_peers=st.integers(1, 4),
            warm=st.sampled_from([0.0, 0.5, 2.0, 4.0]),
            early=st.integers(2, PEERS),
            tells_cuts=st.booleans(),
        )
        def start(self, seed, rounds, min_peers, warm, early, tells_cuts):
            self.net = make_net(PEERS, rounds=rounds, min_peers=min_peers, seed=seed)
            self.net.tells_cuts = tells_cuts
            for index in range(early):  # the others are newcomers, when they restart
                self.net.start(index)
            self.net.run(warm)

        @rule(seconds=st.sampled_from([0.1, 0.3, 1.0, 3.0, 7.0, 13.0]))
        def wait(self, seconds):
            self.net.run(seconds)

        @rule(index=st.integers(0, PEERS - 1))
        def kill(self, index):
            self.net.kill(index)

        @rule()
        def kill_coordinator(self):
            for index, peer in enumerate(self.net.ids):
                seat = self.net.seats.get(peer)
                if seat is not None and seat.coordinates:
                    self.net.kill(index)

        @rule(index=st.integers(0, PEERS - 1))
        def restart(self, index):
            self.net.kill(index)
            self.net.start(index)

        @rule(sides=st.lists(st.integers(0, 2), min_size=PEERS, max_size=PEERS))
        def partition(self, sides):
            groups = [tuple(i for i in range(PEERS) if sides[i] == s) for s in range(3)]
            self.net.partition(*groups)

        @rule(hub=st.integers(0, PEERS - 1), cut=st.integers(0, PEERS - 1))
        def overlap(self, hub, cut):
            """Two halves that share one peer: links are not transitive."""
            rest = [i for i in range(PEERS) if i != hub]
            at = cut % len(rest)
            self.net.partition((hub, *rest[:at]), (hub, *rest[at:]))

        @rule(loss=st.sampled_from([0.0, 0.1, 0.4]))
        def lose(self, loss):
            self.net.loss = loss

        @rule(index=st.integers(0, PEERS - 1), speed=st.sampled_from([1.0, 5.0, 11.0]))
        def slow(self, index, speed):
            """Inner steps that take longer than anybody's patience."""
            if (sums := self.net.sums.get(self.net.ids[index])) is not None:
                sums.speed = speed

        @rule(
            index=st.integers(0, PEERS - 1),
            seconds=st.sampled_from([0.0, 2.0, 4.5, 6.0, 9.0]),
        )
        def newcomer(self, index, seconds):
            """Somebody arrives with nothing, and fetches slowly."""
            self.restart(index)
            self.net.sums[self.net.ids[index]].fetch_seconds = seconds

        @rule(one=st.integers(0, PEERS - 1), other=st.integers(0, PEERS - 1))
        def cut(self, one, other):
            self.net.cut(one, other)

        @rule(index=st.integers(0, PEERS - 1))
        def cut_off(self, index):
            for other in range(PEERS):
                self.net.cut(index, other)

        @rule(index=st.integers(0, PEERS - 1), value=st.sampled_from([None, 0.1, 0.5]))
        def steer(self, index, value):
            """The board reaches one peer before the others, or not at all."""
            peer = self.net.ids[index]
            if (seat := self.net.seats.get(peer)) is not None:
                wanted = Setting("train.outer.learning_rate", value or 0.0, peer)
                seat.set_settings(() if value is None else (wanted,))

        @rule()
        def mend(self):
            self.net.cuts.clear()

        @rule()
        def heal(self):
            self.net.heal()

        def teardown(self):
            """Daemons and networks heal; slow peers stay slow, cut workers stay cut."""
            if not hasattr(self, "net"):
                return
            self.net.heal()
            for index, peer in enumerate(self.net.ids):
                if peer not in self.net.seats:
                    self.net.start(index)
            assert self.net.run(PROGRESS, self.net.all_done), (
                "no progress after the heal"
            )

    return Faults


def test_epochs_and_decisions_are_unique_and_a_healed_mesh_finishes(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("JOBS_EXAMPLES", "20")),
            stateful_step_count=int(os.environ.get("JOBS_STEPS", "12")),
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
