"""Discovery visits the first points that work, and knows who is not connected."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fabric.core.errors import NoRoute, RemoteRefused
from fabric.core.ids import MeshId, PeerId
from nat.discovery.config import DiscoveryConfig
from nat.discovery.core import (
    FULL_EVERY,
    HURRY_SECONDS,
    MAX_FOUND,
    MAX_TRIED,
    Discovery,
    namespace_of,
    order_points,
)
from nat.discovery.rendezvous_records import PeerRecord, Sighting

OWN = PeerId("own")
POINTS = [PeerId(f"point-{i}") for i in range(12)]
ADDRS = ("/ip4/192.0.2.1/tcp/1",)


def core(**config):
    made = Discovery(OWN, DiscoveryConfig(**config), random.Random(0))
    made.set_candidates(POINTS)
    made.set_addrs(ADDRS)
    return made


def sighting(name, seq=1, ttl=7200.0):
    return Sighting(PeerRecord(PeerId(name), seq, ADDRS), ttl)


ME = sighting("own")


def test_the_namespace_is_one_way_and_differs_by_mesh():
    one, two = namespace_of(MeshId("a" * 64)), namespace_of(MeshId("b" * 64))
    assert one != two
    assert "a" * 8 not in one
    assert len(one) == len("fabric/") + 32


def test_peers_with_overlapping_knowledge_prefer_the_same_points():
    left = order_points("ns", [POINTS[:8]], OWN)
    right = order_points("ns", [POINTS[4:]], OWN)
    common = set(POINTS[4:8])
    assert [p for p in left if p in common] == [p for p in right if p in common]
    first = order_points("ns", [POINTS[5:6], [OWN], POINTS], OWN)
    assert first[0] == POINTS[5]
    assert len(first) == len(POINTS)


def test_three_points_are_registered_at_and_asked_about_each_minute():
    made = core()
    visits = made.due(0.0)
    assert [v.point for v in visits] == POINTS[:3]
    assert all(v.register and not v.cookie for v in visits)
    assert made.due(0.0) == []
    for visit in visits:
        made.on_registered(visit.point, 7200, 0.0)
        made.on_found(visit, [ME], b"c", 0.0)
    assert 45 <= made.next_timeout() <= 75
    again = made.due(100.0)
    assert [(v.register, v.cookie) for v in again] == [(False, b"c")] * 3


def test_a_registration_is_renewed_at_half_of_its_life_and_when_addresses_change():
    made = core(rendezvous_points=1)
    (visit,) = made.due(0.0)
    made.on_registered(visit.point, 1000, 0.0)
    made.on_found(visit, [ME], b"c", 0.0)
    (visit,) = made.due(499.0)
    assert not visit.register
    made.on_found(visit, [], b"c", 499.0)
    (visit,) = made.due(600.0)
    assert visit.register
    made.on_registered(visit.point, 1000, 600.0)
    made.on_found(visit, [], b"c", 600.0)
    made.set_addrs([*ADDRS, "/ip4/192.0.2.2/tcp/1"])
    assert made.next_timeout() == 600.0 + HURRY_SECONDS
    assert made.due(605.0)[0].register


def test_points_that_fail_are_replaced_and_tried_again():
    made = core(rendezvous_points=1)
    (visit,) = made.due(0.0)
    made.on_failed(visit, NoRoute("gone"), 0.0)
    (visit,) = made.due(0.0)
    assert visit.point == POINTS[1]
    made.on_found(visit, [ME], b"", 0.0)
    assert [v.point for v in made.due(10.0)] == [POINTS[0]]


def test_a_restarted_point_is_registered_at_again():
    made = core(rendezvous_points=1)
    (visit,) = made.due(0.0)
    made.on_registered(visit.point, 7200, 0.0)
    made.on_found(visit, [ME], b"c", 0.0)
    (visit,) = made.due(100.0)
    made.on_failed(visit, RemoteRefused("old", code="E_INVALID_COOKIE"), 100.0)
    (visit,) = made.due(100.0)
    assert (visit.register, visit.cookie) == (True, b"")


def test_a_point_that_does_not_list_us_is_registered_at_again():
    made = core(rendezvous_points=1)
    (visit,) = made.due(0.0)
    made.on_registered(visit.point, 7200, 0.0)
    made.on_found(visit, [], b"c", 0.0)
    assert made.due(100.0)[0].register


def test_islands_are_those_found_but_not_connected():
    made = core(rendezvous_points=1)
    assert "none of 1" in made.islands((), 0.0).sentence
    (visit,) = made.due(0.0)
    made.on_registered(visit.point, 7200, 0.0)
    made.on_found(visit, [ME, sighting("a"), sighting("b")], b"c", 0.0)
    islands = made.islands({PeerId("a")}, 1.0)
    assert islands.unconnected == ("b",)
    assert "1 members" in islands.sentence
    assert made.hints({PeerId("a")}, 1.0) == {"b": ADDRS}
    assert "no island" in made.islands({PeerId("a"), PeerId("b")}, 1.0).sentence
    assert made.islands((), 7300.0).found == ()


def test_whoever_unregistered_is_dropped_by_the_next_full_answer():
    made, now = core(rendezvous_points=1), 0.0
    for turn in range(FULL_EVERY + 1):
        (visit,) = made.due(now)
        told = [ME, sighting("a")] if turn == 0 else [ME] if not visit.cookie else []
        made.on_found(visit, told, b"c", now)
        assert made.islands((), now).found == (("a",) if turn < FULL_EVERY else ())
        now += 100


def test_what_points_say_is_bounded():
    made = core()
    (visit, *_) = made.due(0.0)
    made.on_found(visit, (sighting(f"p{i}") for i in range(5000)), b"", 0.0)
    assert len(made.islands((), 0.0).found) == MAX_FOUND


def test_the_newest_record_counts_whichever_point_says_it():
    made = core(rendezvous_points=2)
    one, two = made.due(0.0)
    new = Sighting(PeerRecord(PeerId("a"), 9, ("/ip4/192.0.2.7/tcp/7",)), 60.0)
    made.on_found(one, [new], b"", 0.0)
    made.on_found(two, [sighting("a", seq=3)], b"", 0.0)
    assert made.hints((), 0.0) == {"a": new.record.addrs}


class DiscoveryMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.made = core()
        self.now, self.open = 0.0, {}

    @rule(seconds=st.floats(0, 900))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def visit(self):
        for visit in self.made.due(self.now):
            assert visit.point not in self.open
            self.open[visit.point] = visit

    @rule(count=st.integers(0, 12))
    def candidates(self, count):
        self.made.set_candidates(POINTS[12 - count :])

    @rule()
    def hurry(self):
        self.made.hurry(self.now)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), ok=st.booleans(), names=st.sets(st.sampled_from("abcd")))
    def finish(self, data, ok, names):
        visit = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        if ok:
            told = [sighting(name) for name in names]
            self.made.on_found(visit, told, b"c", self.now)
        else:
            self.made.on_failed(visit, NoRoute("gone"), self.now)

    @invariant()
    def bounded(self):
        assert len(self.made.islands((), self.now).points) <= MAX_TRIED
        assert len(self.open) <= len(POINTS)

    def teardown(self):
        # liveness: if from now on every point answers, we are registered at three
        for visit in self.open.values():
            self.made.on_failed(visit, NoRoute("gone"), self.now)
        self.made.set_candidates(POINTS)
        for _ in range(40):
            for visit in self.made.due(self.now):
                if visit.register:
                    self.made.on_registered(visit.point, 7200, self.now)
                self.made.on_found(visit, [ME], b"c", self.now)
            self.now = max(self.now, self.made.next_timeout())
        points = self.made.islands((), self.now).points
        assert sum(p.registered for p in points) >= 3


TestDiscovery = DiscoveryMachine.TestCase
TestDiscovery.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
