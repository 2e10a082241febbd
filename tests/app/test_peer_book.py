"""The peer book dials who is missing, backs off, and always tries again."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fabric.app.peer_book import MAX_RETRY_SECONDS, PeerBook
from fabric.core.errors import NoRoute
from fabric.core.ids import PeerId

PEERS = [PeerId(f"peer-{i}") for i in range(6)]


def book(max_dials=2):
    made = PeerBook(PeerId("me"), max_dials=max_dials, _random=random.Random(0))
    made.learn({p: [f"/ip4/127.0.0.1/tcp/{i}"] for i, p in enumerate(PEERS, 1)})
    return made


def test_own_and_connected_peers_are_not_dialled():
    made = book(max_dials=9)
    made.learn({PeerId("me"): ["/ip4/1.1.1.1/tcp/1"]})
    assert set(made.due(0, connected=PEERS[:4])) == set(PEERS[4:])


def test_the_return_of_one_who_was_away_ends_the_wait_for_the_others():
    """A partition ended: no back-off that grew meanwhile may outlast it."""
    made = book(max_dials=9)
    made.learn({p: ["/ip4/1.1.1.1/tcp/1"] for p in PEERS}, source="record")
    now = 0.0
    for _ in range(8):
        for peer in made.due(now, ()):
            made.on_failure(peer, NoRoute("x"), now)
        now += MAX_RETRY_SECONDS
    for peer in made.due(now, ()):
        made.on_failure(peer, NoRoute("x"), now)
    assert made.due(now + 1, ()) == []
    made.returned({PEERS[2]})  # it dialled us
    assert set(made.due(now + 1, {PEERS[2]})) == set(PEERS) - {PEERS[2]}


def test_a_single_lost_dial_says_nothing_about_others():
    made = book(max_dials=9)
    made.learn({p: ["/ip4/1.1.1.1/tcp/1"] for p in PEERS}, source="record")
    for peer in made.due(0.0, ()):
        made.on_failure(peer, NoRoute("x"), 100.0)
    made.on_success(PEERS[0])
    assert made.due(100.0, {PEERS[0]}) == []


def test_backoff_doubles_up_to_its_bound_and_success_resets():
    made = book(max_dials=9)
    waits = []
    for _ in range(12):
        assert PEERS[0] in made.due(1e9, ())
        made.on_failure(PEERS[0], NoRoute("x"), 1e9)
        waits.append(made.contacts[PEERS[0]].retry_at - 1e9)
        made.contacts[PEERS[0]].retry_at = 0
    assert waits[0] <= 0.5
    assert max(waits) <= MAX_RETRY_SECONDS
    assert waits[5] > waits[0]
    made.on_success(PEERS[0])
    assert made.contacts[PEERS[0]].last_error is None


def test_a_new_address_is_tried_at_once():
    made = book(max_dials=9)
    made.due(0, ())
    made.on_failure(PEERS[0], NoRoute("x"), 0)
    assert made.due(0, ()) == []
    made.learn({PEERS[0]: ["/ip4/127.0.0.1/tcp/99"]})
    assert made.due(0, ()) == [PEERS[0]]


def test_healed_peers_are_dialled_at_once():
    made = book(max_dials=9)
    made.due(0, ())
    made.on_failure(PEERS[0], NoRoute("cut"), 0)
    made.retry_now([PEERS[0], PeerId("nobody")])
    assert made.due(0, ()) == [PEERS[0]]


class BookMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.book = book()
        self.now = 0.0
        self.connected = set()
        self.dialling = set()

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def dial(self):
        due = self.book.due(self.now, self.connected)
        assert not set(due) & (self.connected | self.dialling)
        self.dialling |= set(due)

    @precondition(lambda self: self.dialling)
    @rule(data=st.data(), ok=st.booleans())
    def finish(self, data, ok):
        peer = data.draw(st.sampled_from(sorted(self.dialling)))
        self.dialling.remove(peer)
        if ok:
            self.connected.add(peer)
            self.book.on_success(peer)
        else:
            self.book.on_failure(peer, NoRoute("refused"), self.now)

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def lose(self, data):
        self.connected.remove(data.draw(st.sampled_from(sorted(self.connected))))

    @invariant()
    def bounded(self):
        assert len(self.dialling) <= self.book.max_dials

    def teardown(self):
        # liveness: if every dial now succeeds, everyone is connected in bounded time
        for peer in sorted(self.dialling):
            self.connected.add(peer)
            self.book.on_success(peer)
        for _ in range(50):
            for peer in self.book.due(self.now, self.connected):
                self.connected.add(peer)
                self.book.on_success(peer)
            at = self.book.next_timeout(self.connected)
            if at is None:
                break
            self.now = max(self.now, at)
        assert self.connected == set(PEERS)


TestBook = BookMachine.TestCase
TestBook.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
