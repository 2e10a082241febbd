"""The round machine against a small world of participants, in any order of events."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import Generation, RoundDecision
from training.worker.rounds import LOOKAHEAD_ROUNDS, Piece, Rounds

JOB = JobId("ab" * 32)
ME, A, B = PeerId("me"), PeerId("a"), PeerId("b")


def generation(counter, members, base=0, digest=""):
    return Generation(JOB, counter, ME, tuple(sorted(members)), base, digest, (), "")


def decision(counter, number, contributors, **more):
    tokens = (1,) * len(contributors)
    return RoundDecision(JOB, counter, number, tuple(contributors), tokens, **more)


def piece(text):
    return Piece(10, bytearray(text.encode()), text)


def started(members=(ME, A, B), num_rounds=9):
    rounds = Rounds(JOB, ME, num_rounds)
    assert rounds.apply(generation(1, members))
    assert rounds.missing_state() is not None
    rounds.hold(0, "")
    return rounds


def test_a_round_from_training_to_the_next():
    rounds = started()
    assert rounds.wants_training
    rounds.own_ready(piece("mine"), 2.5)
    assert not rounds.wants_training
    rounds.received(A, 1, 0, piece("a"))
    rounds.decide(decision(1, 0, (A, ME)))
    ready = rounds.step_ready()
    assert ready is not None
    assert ready.contributors == (A, ME)
    assert ready.payloads == (b"a", b"mine")
    rounds.hold(1, "d1")
    assert rounds.wants_training
    report = rounds.report()
    assert (report.round, report.holds, report.tokens) == (1, (), 0)


def test_work_that_the_decision_leaves_out_is_given_up():
    rounds = started()
    rounds.received(A, 1, 0, piece("a"))
    rounds.decide(decision(1, 0, (A,)))
    assert not rounds.wants_training
    assert rounds.step_ready() is not None


def test_a_decision_waits_for_a_contribution_on_its_way():
    rounds = started()
    rounds.own_ready(piece("mine"), 1.0)
    rounds.decide(decision(1, 0, (A, ME)))
    assert rounds.step_ready() is None
    rounds.received(A, 1, 0, piece("a"))
    assert rounds.step_ready() is not None


def test_own_work_survives_a_new_generation_and_is_never_computed_again():
    rounds = started()
    rounds.own_ready(piece("mine"), 1.0)
    rounds.received(A, 1, 0, piece("a"))
    assert rounds.apply(generation(2, (ME, A)))
    assert rounds.held is not None
    assert rounds.held.counter == 2
    assert not rounds.wants_training
    assert rounds.report().holds == (ME,)  # until a says that its work stands
    rounds.vouched(A, 2, 0, "a")
    assert rounds.report().holds == (A, ME)


def test_two_different_contributions_of_one_author_never_both_count():
    """``a`` restarted: what it sent before must not be averaged by us alone."""
    rounds = started()
    rounds.own_ready(piece("mine"), 1.0)
    rounds.received(A, 1, 0, piece("before"))
    rounds.apply(generation(2, (ME, A, B)))
    rounds.vouched(A, 2, 0, "after")
    assert A not in rounds.report().holds
    assert rounds.received(A, 2, 0, piece("after"))
    assert A in rounds.report().holds
    assert not rounds.received(A, 2, 0, piece("again"))
    assert not rounds.received(A, 1, 0, piece("before"))
    rounds.decide(decision(2, 0, (A, ME)))
    assert rounds.step_ready().payloads == (b"after", b"mine")


def test_a_generation_from_another_state_drops_ours():
    rounds = started()
    rounds.own_ready(piece("mine"), 1.0)
    rounds.apply(generation(2, (ME, A), base=3, digest="d3"))
    wanted = rounds.missing_state()
    assert wanted is not None
    assert wanted.base_round == 3
    assert rounds.report().holds == ()
    rounds.received(A, 2, 3, piece("a3"))
    rounds.decide(decision(2, 3, (A,)))
    assert rounds.step_ready() is None  # no state to step from yet
    rounds.hold(3, "d3")
    assert rounds.step_ready() is not None


def test_stale_and_foreign_messages_change_nothing():
    rounds = started((ME, A))
    assert not rounds.apply(generation(1, (ME, B)))
    assert not rounds.received(B, 1, 0, piece("b"))
    assert not rounds.received(A, 1, LOOKAHEAD_ROUNDS + 1, piece("far"))
    assert not rounds.decide(decision(0, 0, (A,)))
    assert not rounds.decide(decision(1, LOOKAHEAD_ROUNDS + 1, (A,)))
    assert not rounds.decide(RoundDecision(JOB, 1, 0, (A,), (0,)))
    assert not rounds.decide(RoundDecision(JOB, 1, 0, (A, ME), (1,)))
    assert rounds.step_ready() is None


def test_the_last_round_ends_training():
    rounds = started((ME,), num_rounds=1)
    rounds.own_ready(piece("mine"), 1.0)
    rounds.decide(decision(1, 0, (ME,), last=True))
    assert rounds.step_ready() is not None
    rounds.hold(1, "d1")
    assert rounds.over
    assert not rounds.wants_training


class RoundsMachine(RuleBasedStateMachine):
    """Random events; the coordinator decides only among what we reported."""

    @initialize()
    def begin(self):
        self.rounds = started(num_rounds=50)
        self.counter = 1
        self.steps = 0

    @rule(peer=st.sampled_from([A, B]), ahead=st.integers(-1, 4), lag=st.integers(0, 1))
    def contribution(self, peer, ahead, lag):
        number = self.rounds.round + ahead
        if number >= 0:
            self.rounds.received(
                peer, self.counter - lag, number, piece(f"{peer}{number}")
            )

    @precondition(lambda self: self.rounds.wants_training)
    @rule()
    def finish_inner_steps(self):
        self.rounds.own_ready(piece(f"me{self.rounds.round}"), 1.0)

    @precondition(lambda self: self.rounds.takes_part)
    @rule(extra=st.sampled_from([(), (A,), (B,)]))
    def decide(self, extra):
        report = self.rounds.report()
        contributors = sorted({*report.holds, *extra})
        if self.rounds.held is not None and contributors:
            self.rounds.decide(decision(self.counter, report.round, contributors))

    @rule(members=st.sampled_from([(ME, A), (ME, A, B), (A, B)]), same=st.booleans())
    def new_generation(self, members, same):
        held, self.counter = self.rounds.held, self.counter + 1
        base = (held.round, held.state_digest) if held and same else (0, "")
        if not same:
            base = (self.rounds.round + 1, "other")
        self.rounds.apply(generation(self.counter, members, *base))

    @precondition(lambda self: self.rounds.missing_state() is not None)
    @rule()
    def state_arrives(self):
        wanted = self.rounds.missing_state()
        self.rounds.hold(wanted.base_round, wanted.state_digest)

    @precondition(lambda self: self.rounds.step_ready() is not None)
    @rule()
    def step(self):
        number = self.rounds.round
        ready = self.rounds.step_ready()
        for peer, payload in zip(ready.contributors, ready.payloads, strict=True):
            assert payload.decode() == f"{peer}{number}"
        self.rounds.hold(number + 1, f"d{number + 1}")

    @invariant()
    def memory_is_bounded(self):
        assert len(self.rounds._pieces) <= 2 * (LOOKAHEAD_ROUNDS + 1)
        assert self.rounds._pieces.keys() == self.rounds._vouched.keys()
        assert len(self.rounds._decisions) <= LOOKAHEAD_ROUNDS + 1

    @invariant()
    def a_report_is_of_this_epoch(self):
        report = self.rounds.report()
        if report is not None:
            assert report.counter == self.counter
            assert set(report.holds) <= {ME, A, B}

    def teardown(self):
        """From any state, a full decision with all contributions ends the round."""
        if not hasattr(self, "rounds"):
            return
        self.counter += 1
        held = self.rounds.held
        base = (held.round, held.state_digest) if held else (7, "d7")
        self.rounds.apply(generation(self.counter, (ME, A, B), *base))
        if self.rounds.missing_state():
            self.rounds.hold(*base)
        if self.rounds.wants_training:
            self.rounds.own_ready(piece(f"me{self.rounds.round}"), 1.0)
        for peer in (A, B):
            self.rounds.received(
                peer, self.counter, self.rounds.round, piece(f"{peer}!")
            )
        assert self.rounds.report().holds == (A, B, ME)
        self.rounds.decide(decision(self.counter, self.rounds.round, (A, B, ME)))
        assert self.rounds.step_ready() is not None


TestRoundsMachine = RoundsMachine.TestCase
TestRoundsMachine.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None
)
