import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fabric.core.errors import ResourceExhausted
from fabric.core.ids import PeerId
from inference.messages import Sampling
from inference.schedule import Schedule
from inference.worker_messages import Opening

GATEWAY = PeerId("gateway")


def opening(session, prompt_tokens, max_tokens=3):
    return Opening(session, GATEWAY, prompt_tokens, Sampling(max_tokens))


class ScheduleMachine(RuleBasedStateMachine):
    """A pipeline that computes slices in order, seen through a KV memory model.

    The memory of a slot holds the tokens fed into it. Whenever a token is asked for,
    the memory must hold exactly the prompt and the tokens picked so far.
    """

    @initialize(
        slots=st.integers(1, 3), waiting=st.integers(0, 2), budget=st.integers(1, 5),
        stages=st.integers(1, 3),
    )  # fmt: skip
    def start(self, slots, waiting, budget, stages):
        self.schedule = Schedule(slots, waiting, budget, stages)
        self.budget, self.now, self.count = budget, 0.0, 0
        self.prompts, self.picked, self.ended = {}, {}, set()
        self.memory, self.asked = {}, []

    @rule(length=st.integers(1, 12), max_tokens=st.integers(1, 4))
    def submit(self, length, max_tokens):
        session = f"s{self.count}"
        prompt = tuple(range(self.count, self.count + length))
        self.count += 1
        try:
            self.schedule.submit(opening(session, length, max_tokens), prompt, self.now)
        except ResourceExhausted:
            return
        self.prompts[session], self.picked[session] = prompt, []

    @rule(late=st.booleans())
    def step(self, late):
        deadline = self.schedule.next_timeout()
        if late and deadline is not None:
            self.now = max(self.now, deadline)
        slices = self.schedule.take(self.now)
        if late and deadline is not None:
            assert slices, "a step is due at the deadline"
        slots = [piece.row.slot for piece in slices]
        assert len(set(slots)) == len(slots)
        prefill = sum(len(p.tokens) for p in slices if len(p.tokens) > 1)
        assert prefill <= self.budget
        for piece in slices:
            self._compute(piece)
        self.schedule.stepped(0.01)

    def _compute(self, piece):
        row = piece.row
        if row.position == 0:
            assert row.opening is not None
            self.memory[row.slot] = (row.sequence, row.opening.session, [])
        sequence, session, held = self.memory[row.slot]
        assert sequence == row.sequence
        assert len(held) == row.position
        held.extend(piece.tokens)
        if row.sample:
            assert held == [*self.prompts[session], *self.picked[session]]
            self.asked.append((sequence, session))

    @rule(data=st.data(), finish=st.booleans())
    def pick(self, data, finish):
        if not self.asked:
            return
        sequence, session = self.asked.pop(
            data.draw(st.integers(0, len(self.asked) - 1))
        )
        token = 1000 + len(self.picked[session])
        ended = self.schedule.pick(
            sequence, token, "length" if finish else "", self.now
        )
        if session in self.ended:
            assert ended is None
        elif finish:
            assert ended.session == session
            self.ended.add(session)
        else:
            self.picked[session].append(token)

    @rule(data=st.data())
    def cancel(self, data):
        known = sorted(self.prompts)
        if not known:
            return
        session = data.draw(st.sampled_from(known))
        there = self.schedule.cancel(session, GATEWAY, self.now)
        assert there == (session not in self.ended)
        self.ended.add(session)

    @rule(stages=st.integers(1, 3))
    def restart(self, stages):
        self.schedule.restart(stages, self.now)
        self.memory.clear()
        self.asked.clear()

    @rule(seconds=st.floats(0, 0.1))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def sound(self):
        if hasattr(self, "schedule"):
            self.schedule.check_integrity()

    def teardown(self):
        """From any state, everything ends when the pipeline goes on."""
        if not hasattr(self, "schedule"):
            return
        for _ in range(500):
            while self.asked:
                sequence, session = self.asked.pop()
                if self.schedule.pick(sequence, -1, "stop", self.now):
                    self.ended.add(session)
            deadline = self.schedule.next_timeout()
            if deadline is None:
                break
            self.now = max(self.now, deadline)
            for piece in self.schedule.take(self.now):
                self._compute(piece)
        assert self.schedule.openings() == []
        assert self.ended == set(self.prompts)


TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_decodes_go_together_and_a_long_prompt_does_not_delay_them():
    schedule = Schedule(4, 4, prefill_tokens=8)
    for name in "ab":
        schedule.submit(opening(name, 1), (1,), 0.0)
    first = schedule.take(0.0)
    assert [p.row.length for p in first] == [1, 1]
    schedule.submit(opening("long", 100), tuple(range(100)), 0.0)
    for piece in first:
        schedule.pick(piece.row.sequence, 7, "", 0.0)
    assert [p.row.length for p in schedule.take(0.0)] == [1, 1, 8]


def test_a_lone_sequence_waits_for_the_others_at_most_half_a_step():
    schedule = Schedule(4, 4, prefill_tokens=8)
    for name in "ab":
        schedule.submit(opening(name, 1), (1,), 0.0)
    pieces = schedule.take(0.0)
    schedule.stepped(0.05)
    schedule.pick(pieces[0].row.sequence, 7, "", 1.0)
    assert schedule.take(1.0) == []
    assert schedule.next_timeout() == pytest.approx(1.005)
    assert len(schedule.take(1.005)) == 1
