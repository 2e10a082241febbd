"""Copies among peers that come and go: enough, spread out, and never too many."""

import os
import random

import pytest

from checkpoints.mesh.placement import Domain, missing_copies, spread, width
from checkpoints.mesh.replicas import ReplicaTable, Want
from fabric.core.digest import hex_digest
from fabric.core.ids import BlobId, PeerId

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
PERIOD, LOST_AFTER = 1.0, 10.0
SIZE = 100


def root_of(number):
    return BlobId(hex_digest(str(number).encode()))


def want(number, copies=2, **other):
    return Want(root_of(number), "run", number, SIZE, copies, **other)


class World:
    """Peers with tables, each on its host and site, that ask each other every tick."""

    def __init__(self, sites, *, room=1000, start=0.0):
        self.now = start
        self.domains = {
            PeerId(f"{site}{host}.{index}"): Domain(site, f"{site}{host}")
            for site, hosts in sites.items()
            for host, count in enumerate(hosts)
            for index in range(count)
        }
        self.held = {peer: set() for peer in self.domains}
        self.room = dict.fromkeys(self.domains, room)
        self.broken = set()
        self.refuses = {peer: set() for peer in self.domains}
        self.away = set()
        self.wants = []
        self.made = self.dropped = 0
        self.tables = {}
        for peer in self.domains:
            self.restart(peer)

    def restart(self, peer):
        self.tables[peer] = ReplicaTable(peer, self.now, LOST_AFTER)

    @property
    def live(self):
        return [peer for peer in self.domains if peer not in self.away]

    def holders(self, root):
        return {peer for peer in self.live if root in self.held[peer]}

    def tick(self, rng=None):
        self.now += PERIOD
        order = self.live
        if rng is not None:
            rng.shuffle(order)
        domains = {peer: self.domains[peer] for peer in self.live}
        for peer in order:
            table = self.tables[peer]
            table.set_members(domains)
            table.set_wants(self.wants, self.now)
            self.answer(table, peer, [w.root for w in self.wants])
            for other, roots in table.asks().items():
                if other in self.away:
                    table.silent(other, roots)
                else:
                    self.answer(table, other, roots)
            for each in table.to_copy(self.now)[:1]:
                self.copy(peer, each)
            for each in table.to_remake(self.now):
                fresh = [p for p in each.pieces if not self.holders(p)]
                self.held[peer].update(fresh)
            for each in table.to_restore(self.now):
                held = [p for p in each.pieces if self.holders(p)]
                assert len(held) >= each.needed
                self.held[peer].add(each.root)
            for each in table.to_drop(self.now):
                self.held[peer].remove(each.root)
                self.room[peer] += each.size
                self.dropped += 1

    def answer(self, table, peer, roots):
        table.answered(
            peer,
            roots,
            self.held[peer] & set(roots),
            self.refuses[peer] & set(roots),
            self.room[peer],
            self.now,
        )

    def copy(self, peer, each):
        if not self.holders(each.root):
            return
        if peer in self.broken:
            self.refuses[peer].add(each.root)
            return
        self.made += 1
        self.held[peer].add(each.root)
        self.room[peer] -= each.size

    def publish(self, number, writer, copies=2, **other):
        hints = frozenset({writer})
        self.wants.append(want(number, copies, hints=hints, **other))
        self.held[writer].add(root_of(number))

    def run(self, ticks):
        for _ in range(ticks):
            self.tick()


@pytest.fixture
def three_sites():
    return World({"a": [2, 1], "b": [1], "c": [1, 1]})


def test_a_copy_goes_to_another_site_once(three_sites):
    world = three_sites
    for number in range(20):
        world.publish(number, PeerId("a0.0"))
        world.run(2)
    world.run(5)
    for number in range(20):
        holders = world.holders(root_of(number))
        assert len(holders) == 2
        assert width(holders, world.domains) == (2, 2)
    assert (world.made, world.dropped) == (20, 0)


def test_a_lost_holder_is_replaced_after_the_bound_and_not_before(three_sites):
    world = three_sites
    world.publish(0, PeerId("a0.0"))
    world.run(3)
    (other,) = world.holders(root_of(0)) - {"a0.0"}
    world.away.add(other)
    world.run(int(LOST_AFTER) - 2)
    assert world.holders(root_of(0)) == {"a0.0"}
    world.run(4)
    assert len(world.holders(root_of(0))) == 2
    # it comes back: one too many, and one goes
    world.away.clear()
    world.run(3)
    assert len(world.holders(root_of(0))) == 2
    assert (world.made, world.dropped) == (2, 1)


def test_a_restart_and_a_short_absence_move_nothing(three_sites):
    world = three_sites
    world.publish(0, PeerId("a0.0"))
    world.run(3)
    before = world.holders(root_of(0))
    for peer in world.domains:
        world.away.add(peer)
        world.run(4)
        world.away.clear()
        world.restart(peer)
        world.run(4)
    assert world.holders(root_of(0)) == before
    assert world.made == 1


def test_who_has_no_room_or_fails_is_passed_over(three_sites):
    world = three_sites
    chosen = spread(root_of(0), set(world.domains) - {"a0.0"}, world.domains, count=9)
    world.room[chosen[0]] = SIZE - 1
    world.broken.add(chosen[1])
    world.publish(0, PeerId("a0.0"), copies=3)
    world.run(6)
    assert len(world.holders(root_of(0))) == 3
    assert not world.holders(root_of(0)) & set(chosen[:2])


def test_copies_of_one_host_move_apart_when_another_site_joins():
    world = World({"a": [3], "b": [1]})
    far = PeerId("b0.0")
    world.away.add(far)
    world.publish(0, PeerId("a0.0"))
    world.run(4)
    assert width(world.holders(root_of(0)), world.domains) == (1, 1)
    world.away.clear()
    world.run(6)
    assert far in world.holders(root_of(0))
    assert len(world.holders(root_of(0))) == 2


def coded(world, number, data, extra, copies=2):
    """Publish a whole and its pieces, all held by the first peer."""
    writer = min(world.domains)
    pieces = tuple(root_of(f"{number}.{n}") for n in range(data + extra))
    world.publish(number, writer, copies, pieces=pieces, needed=data)
    for piece in pieces:
        hints = frozenset({writer})
        world.wants.append(
            Want(piece, "run", number, SIZE, 1, hints, siblings=frozenset(pieces))
        )
        world.held[writer].add(piece)
    return pieces


@pytest.mark.parametrize("sites", [{"a": [1], "b": [1], "c": [1, 1], "d": [1, 1]}])
def test_pieces_move_apart_and_then_one_whole_copy_is_enough(sites):
    world = World(sites)
    pieces = coded(world, 0, 4, 2)
    world.run(30)
    assert [len(world.holders(piece)) for piece in pieces] == [1] * 6
    assert {len(world.held[p] & set(pieces)) for p in world.live} == {1}
    assert len(world.holders(root_of(0))) == 1
    moved = world.made
    world.run(30)
    assert world.made == moved, "and all is quiet"


def test_lost_pieces_are_made_again_and_a_lost_whole_is_restored():
    world = World({"a": [1], "b": [1], "c": [1], "d": [1], "e": [1]})
    pieces = coded(world, 0, 2, 2)
    world.run(25)
    (whole,) = world.holders(root_of(0))
    victim = next(p for p in world.live if p != whole and world.held[p] & set(pieces))
    world.away.add(victim)
    world.run(int(LOST_AFTER) + 10)
    assert all(len(world.holders(piece)) == 1 for piece in pieces)
    world.away.add(whole)
    world.run(2 * int(LOST_AFTER) + 10)
    assert len(world.holders(root_of(0))) == 1
    assert all(len(world.holders(piece)) == 1 for piece in pieces)


def test_two_peers_keep_the_whole_copies_beside_the_pieces():
    world = World({"a": [1], "b": [1]})
    coded(world, 0, 4, 2)
    world.run(30)
    assert len(world.holders(root_of(0))) == 2, "a lost peer would leave too few"


def test_all_copies_are_lost_when_no_holder_comes_back(three_sites):
    world = three_sites
    world.publish(0, PeerId("a0.0"), copies=1)
    world.away.add(PeerId("a0.0"))
    world.run(30)
    assert world.made == 0
    world.away.clear()
    world.run(3)
    assert world.holders(root_of(0)) == {"a0.0"}


@pytest.mark.parametrize("seed", range(4 * FACTOR))
def test_any_order_of_losses_ends_with_enough_copies_and_no_more(seed):
    rng = random.Random(seed)
    hosts = {site: [rng.randint(1, 2)] * rng.randint(1, 3) for site in "abc"}
    world = World(hosts)
    for number in range(6):
        world.publish(number, rng.choice(world.live), copies=rng.randint(1, 3))
        for _ in range(rng.randint(0, 6)):
            if len(world.live) > 4 and rng.random() < 0.4:
                gone = rng.choice(world.live)
                safe = all(
                    len(world.holders(w.root) - {gone}) >= 1 for w in world.wants
                )
                if safe:
                    world.away.add(gone)
            elif world.away and rng.random() < 0.5:
                back = rng.choice(sorted(world.away))
                world.away.remove(back)
                if rng.random() < 0.5:
                    world.restart(back)
            world.tick(rng)
    for _ in range(4 * int(LOST_AFTER)):
        world.tick(rng)
    for each in world.wants:
        live = len(world.live)
        assert len(world.holders(each.root)) == min(each.copies, live)
        table = world.tables[world.live[0]]
        assert table.copies(world.now).get(each.root, (0, 0))[1] in (0, each.copies)
    settled = world.made + world.dropped
    for _ in range(2 * int(LOST_AFTER)):
        world.tick(rng)
    assert world.made + world.dropped == settled, "nothing moves once all is well"


def test_a_copy_more_is_wanted_only_where_it_spreads_them():
    domains = {PeerId(p): Domain(p[0], p[:2]) for p in ("a1x", "a1y", "a2x", "b1x")}
    one_host = {PeerId("a1x"), PeerId("a1y")}
    assert missing_copies("r", one_host, set(domains), domains, 2) == ["b1x"]
    apart = {PeerId("a1x"), PeerId("b1x")}
    assert missing_copies("r", apart, set(domains), domains, 2) == []
    assert missing_copies("r", apart, {PeerId("a2x")}, domains, 3) == ["a2x"]
