"""Which relays hold reservations: on virtual time, against a simulated internet."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nat.relay.circuit import MAX_LIFE_SECONDS, Probe, Reservations, Reserve
from nat.relay.config import CircuitConfig
from nat.relay.messages import UNLIMITED, Limit

SMALL = Limit(duration_seconds=120, data_bytes=128 << 10)
"""What relays of other implementations allow by default."""


def addrs(name, network=0):
    return (f"/ip4/203.0.{network}.{ord(name)}/tcp/4801/p2p/{name}",)


class World:
    """Relays that answer as the test says; time jumps from event to event."""

    def __init__(self, rtts, *, networks=None, limits=None, **settings):
        self.rtts = dict(rtts)
        self.networks = networks or {}
        self.limits = limits or {}
        self.full = set()
        self.dead = set()
        self.life = {}
        self.now = 0.0
        self.asked = []
        self.due = []
        self.reservations = Reservations(CircuitConfig(**settings))
        self.reservations.set_candidates(
            {
                name: addrs(name, self.networks.get(name, ord(name)))
                for name in self.rtts
            }
        )

    def run(self, until):
        """Do what the core says until then."""
        while True:
            for action in self.reservations.actions(self.now):
                self.asked.append((self.now, action))
                self.due.append((self.now + self._seconds(action), action))
            times = [at for at, _ in self.due]
            timeout = self.reservations.next_timeout(self.now)
            if timeout is not None:
                assert timeout > self.now
                times.append(timeout)
            if not times or min(times) > until:
                self.now = until
                return
            self.now = min(times)
            for item in [item for item in self.due if item[0] <= self.now]:
                self.due.remove(item)
                self._answer(item[1])

    def _seconds(self, action):
        return 3.0 if action.relay in self.dead else self.rtts[action.relay]

    def _answer(self, action):
        core, relay = self.reservations, action.relay
        if relay in self.dead:
            core.on_failed(relay, "no answer", self.now)
        elif isinstance(action, Probe):
            core.on_probed(relay, self.rtts[relay])
        elif relay in self.full:
            core.on_failed(relay, "no room", self.now)
        else:
            limit = self.limits.get(relay, UNLIMITED)
            life = self.life.get(relay, 3600.0)
            core.on_reserved(relay, life, addrs(relay), limit, self.now)

    @property
    def held(self):
        return {each.relay for each in self.reservations.status() if each.held}

    def asks(self, kind, relay):
        return [at for at, a in self.asked if a == kind(relay)]


def test_the_two_nearest_hold_reservations_soon():
    world = World({"a": 0.3, "b": 0.02, "c": 0.1, "d": 0.5})
    world.run(1)
    assert world.held == {"b", "c"}
    first = world.reservations.announced()[0]
    assert first == "/ip4/203.0.0.98/tcp/4801/p2p/b/p2p-circuit"
    assert world.asks(Reserve, "b")[0] == 0.02  # not after the slowest probe


def test_relays_of_one_failure_domain_are_avoided():
    networks = {"a": 7, "b": 7, "c": 9}
    world = World({"a": 0.01, "b": 0.02, "c": 0.4}, networks=networks)
    world.run(2)
    assert world.held == {"a", "c"}


def test_a_single_domain_is_better_than_one_relay():
    world = World({"a": 0.01, "b": 0.02}, networks={"a": 7, "b": 7})
    world.dead.add("z")
    world.run(2)
    assert world.held == {"a", "b"}


def test_reservations_are_renewed_at_three_quarters_of_their_life():
    world = World({"a": 0.01, "b": 0.02})
    world.life = {"a": 400.0, "b": 10 * MAX_LIFE_SECONDS}
    world.run(4000)
    renewals = world.asks(Reserve, "a")
    gaps = [later - at for at, later in itertools.pairwise(renewals)]
    assert all(300 <= gap < 301 for gap in gaps)
    # a relay whose clock is hours ahead is asked within the hour all the same
    assert world.asks(Reserve, "b")[1] < MAX_LIFE_SECONDS
    assert world.held == {"a", "b"}


def test_a_relay_whose_clock_is_behind_is_not_asked_all_the_time():
    world = World({"a": 0.01})
    world.life = {"a": -7200.0}
    world.run(600)
    assert world.held == {"a"}
    assert len(world.asks(Reserve, "a")) <= 15


def test_a_relay_that_is_gone_is_replaced_at_once():
    world = World({"a": 0.01, "b": 0.02, "c": 0.3})
    world.run(10)
    world.dead.add("a")
    world.reservations.on_lost("a", world.now)
    assert world.held == {"b"}
    world.run(10.5)
    assert world.held == {"b", "c"}


def test_a_relay_that_refuses_is_replaced_and_asked_ever_less():
    world = World({"a": 0.01, "b": 0.02})
    world.full.add("a")
    world.run(1000)
    assert world.held == {"b"}
    assert [round(at) for at in world.asks(Reserve, "a")] == [0, 5, 35, 155, 755]
    world.full.clear()
    world.run(3000)
    assert world.held == {"a", "b"}


def test_a_renewal_that_fails_moves_on_before_the_life_ends():
    world = World({"a": 0.01, "b": 0.02, "c": 0.03})
    world.run(1)
    world.full.add("a")
    world.run(0.76 * 3600)
    assert world.held == {"b", "c"}


def test_small_limits_are_for_signalling_until_there_is_better():
    world = World({"a": 0.01, "b": 0.02, "c": 0.03}, limits={"a": SMALL, "b": SMALL})
    world.full.add("c")
    world.run(1)
    assert world.held == {"a", "b"}
    assert not any(each.data for each in world.reservations.status() if each.held)
    world.full.clear()
    world.run(40)
    assert world.held == {"a", "b", "c"}
    world.reservations.set_candidates({name: addrs(name, ord(name)) for name in "abcd"})
    world.rtts["d"] = 0.5
    world.run(50)
    assert world.held == {"c", "d"}


def test_nothing_is_held_while_the_world_reaches_us():
    world = World({"a": 0.01, "b": 0.02})
    world.run(1)
    world.reservations.set_wanted(False)
    assert world.reservations.announced() == ()
    assert world.reservations.next_timeout(world.now) is None
    assert world.reservations.actions(world.now) == []
    world.reservations.set_wanted(True)
    world.run(2)
    assert world.held == {"a", "b"}


def test_a_renewal_is_asked_for_once():
    world = World({"a": 0.01})
    world.run(1)
    assert world.reservations.actions(3000) == [Reserve("a")]
    assert world.reservations.actions(3001) == []
    assert world.held == {"a"}  # and announced meanwhile


def test_a_relay_that_served_well_is_soon_asked_again():
    world = World({"a": 0.01})
    world.full.add("a")
    world.run(200)
    world.full.clear()
    world.run(1000)
    world.reservations.on_lost("a", 1000)
    world.run(1000.5)  # most often our own network changed
    assert world.held == {"a"}
    world.reservations.on_lost("a", 1001)
    world.run(1005)  # it did not keep its word for long
    assert world.held == set()
    world.run(1007)
    assert world.held == {"a"}


def test_a_changed_network_makes_every_wait_void():
    world = World({"a": 0.01, "b": 0.02})
    world.full |= {"a", "b"}
    world.run(200)
    world.full.clear()
    assert world.held == set()
    world.reservations.network_changed(200)
    world.run(201)
    assert world.held == {"a", "b"}


def test_what_is_granted_when_it_is_wanted_no_more_is_not_held():
    world = World({"a": 0.01})
    (probe,) = world.reservations.actions(0)
    world.reservations.on_probed(probe.relay, 0.01)
    assert world.reservations.actions(0) == [Reserve("a")]
    world.reservations.set_wanted(False)
    world.reservations.on_reserved("a", 3600, addrs("a"), UNLIMITED, 1)
    assert world.held == set()


def test_a_candidate_that_was_withdrawn_while_probed_is_not_asked():
    world = World({"a": 0.01})
    world.reservations.actions(0)
    world.reservations.set_candidates({})
    world.reservations.on_probed("a", 0.01)
    assert world.reservations.actions(1) == []
    for late in ("a", "gone"):  # answers to what is forgotten harm nobody
        world.reservations.on_failed(late, "late", 1)
        world.reservations.on_probed(late, 1)
        world.reservations.on_reserved(late, 1, (), UNLIMITED, 1)
    assert world.reservations.status() == ()


def test_circuits_are_expected_from_relays_that_hold_or_are_asked():
    world = World({"a": 0.01})
    assert not world.reservations.expects("a")
    world.run(1)
    assert world.reservations.expects("a")
    world.reservations.on_lost("a", 1)
    assert not world.reservations.expects("a")
    assert not world.reservations.expects("nobody")


def test_held_relays_stay_when_they_are_no_candidates_any_more():
    world = World({"a": 0.01, "b": 0.02})
    world.run(1)
    world.reservations.set_candidates({})
    world.run(2)
    assert world.held == {"a", "b"}
    world.reservations.on_lost("a", 2)
    assert [each.relay for each in world.reservations.status()] == ["b"]


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_whatever_fails_it_ends_with_two_when_the_world_is_well(seed, num):
    """Liveness: break things at random, then heal everything and wait."""
    rng = random.Random(seed)
    names = "abcdefgh"[:num]
    world = World({name: rng.uniform(0.001, 2.5) for name in names})
    for _ in range(20):
        world.run(world.now + rng.uniform(0, 400))
        name = rng.choice(names)
        match rng.randrange(5):
            case 0:
                world.dead.add(name)
                world.reservations.on_lost(name, world.now)
            case 1:
                world.dead.discard(name)
            case 2:
                world.full.add(name)
            case 3:
                world.full.discard(name)
            case 4:
                world.life[name] = rng.uniform(-10, 5000)
        assert len(world.held) <= max(2, num)
    world.dead.clear()
    world.full.clear()
    world.run(world.now + 700)
    assert len(world.held) == min(2, num)
