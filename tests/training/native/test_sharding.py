"""The geometry of nested partitions: they tile, they nest, and bytes follow."""

import itertools
import os
import random
from math import prod

import pytest

from fabric.core.errors import ConfigError
from training.sharding import (
    DOMAIN,
    GROUP,
    ISLAND,
    WORLD,
    Geometry,
    Nesting,
    nest,
    numel,
    overlap,
)
from training.sharding_bytes import Wires, encoded_bytes, memory, padded_shard, traffic
from training.sharding_moves import WEIGHT_LEVELS, gathering, reduction

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
SEED = int(os.environ.get("FABRIC_TEST_SEED", "0"))
SHAPES = [(7, 5), (3,), (64,), (1, 9), (10, 2, 3)]
UNITS = [range(2), range(2, 5)]


def uneven(rng):
    """Any nesting at all: islands, groups and domains of random sizes."""
    ranks = list(range(rng.randint(1, 8)))
    rng.shuffle(ranks)

    def join(parts):
        parts, joined = list(parts), []
        while parts:
            count = rng.randint(1, len(parts))
            joined.append(tuple(itertools.chain(*parts[:count])))
            parts = parts[count:]
        return tuple(joined)

    islands = join([(rank,) for rank in ranks])
    groups = join(islands)
    return Nesting(islands, groups, join(groups))


def nestings():
    rng = random.Random(SEED)
    even = [nest(8, 2, 4, 8), nest(4, 1, 2, 2), nest(7, 2, 3, 5), nest(1, 1, 1, 1)]
    return even + [uneven(rng) for _ in range(8 * FACTOR)]


def elements(cut):
    return {(t, at) for t, begin, end in cut for at in range(begin, end)}


def test_every_level_tiles_and_lies_in_the_level_before():
    everything = elements([(t, 0, prod(s)) for t, s in enumerate(SHAPES)])
    for nesting in nestings():
        geometry = Geometry(SHAPES, nesting)
        for level in (ISLAND, GROUP, DOMAIN, WORLD):
            cuts = geometry.cuts[level]
            for part in nesting.parts(level):
                found = [e for rank in part for e in sorted(elements(cuts[rank]))]
                assert len(found) == len(everything)
                assert set(found) == everything
            if level > ISLAND:
                for rank in nesting.world:
                    before = elements(geometry.cuts[level - 1][rank])
                    assert elements(cuts[rank]) <= before


def test_every_rank_has_its_share():
    shapes = [(64, 30), (120,), (17, 60)]
    for nesting in nestings():
        geometry = Geometry(shapes, nesting)
        for rank in nesting.world:
            part = nesting.part(ISLAND, rank)
            weights = geometry.held(ISLAND, rank)
            for level in (GROUP, DOMAIN, WORLD):
                share = weights * len(part) / len(nesting.part(level, rank))
                cells = len(shapes) * len(nesting.world) * (level + 1)
                assert abs(geometry.held(level, rank) - share) <= cells


def test_reduction_brings_every_copy_to_its_keeper():
    for nesting in nestings():
        geometry = Geometry(SHAPES, nesting)
        for level in (GROUP, DOMAIN, WORLD):
            for unit in UNITS:
                moves = {r: reduction(geometry, level, r, unit) for r in nesting.world}
                for rank, mine in moves.items():
                    sides = nesting.sides(level, rank)
                    kept = [p for p in geometry.cuts[level][rank] if p.tensor in unit]
                    came = [e for cut in mine.receives.values() for e in elements(cut)]
                    assert sorted(came) == sorted(
                        e for e in elements(kept) for _ in range(len(sides) - 1)
                    )
                    for peer, cut in mine.sends.items():
                        assert moves[peer].receives[rank] == cut


def test_gathering_forwards_every_atom_once():
    for nesting in nestings():
        geometry = Geometry(SHAPES, nesting)
        for unit in UNITS:
            plans = {
                r: gathering(geometry, WEIGHT_LEVELS, r, unit) for r in nesting.world
            }
            for rank, plan in plans.items():
                wanted = [p for p in geometry.cuts[ISLAND][rank] if p.tensor in unit]
                found = [e for atom in plan.atoms for e in elements(atom.pieces)]
                assert sorted(found) == sorted(elements(wanted))
                own = [e for n in plan.own for e in elements(plan.atoms[n].pieces)]
                states = [p for p in geometry.cuts[DOMAIN][rank] if p.tensor in unit]
                assert sorted(own) == sorted(elements(states))
                holding = set(plan.own)
                for number, hop in enumerate(plan.hops):
                    for peer, atoms in hop.sends.items():
                        assert set(atoms) <= holding
                        theirs = plans[peer].hops[number].receives[rank]
                        assert [plan.atoms[n].pieces for n in atoms] == [
                            plans[peer].atoms[n].pieces for n in theirs
                        ]
                    holding |= {n for ns in hop.receives.values() for n in ns}
                assert holding == set(range(len(plan.atoms)))


def test_bytes_are_the_closed_form():
    """The table of the module's docstring, for sizes that divide and for others."""
    for nesting in nestings():
        geometry = Geometry(SHAPES, nesting)
        count = sum(prod(shape) for shape in SHAPES)
        found = traffic(geometry, UNITS, Wires(), micro_steps=3)
        sums = {}
        for (operation, source, target), size in found.items():
            assert source != target
            sums[operation] = sums.get(operation, 0) + size
        islands, groups, domains = nesting.islands, nesting.groups, nesting.domains
        padded = sum(
            (len(i) - 1) * len(i) * padded_shard(SHAPES, len(i)) for i in islands
        )
        expected = {
            "gather_w": 2 * 3 * 4 * padded,
            "reduce_w": 3 * 4 * padded,
            "reduce_g": 3 * 4 * count * (len(islands) - len(groups)),
            "reduce_o": 4 * count * (len(groups) - len(domains)),
            "reduce_x": 4 * count * (len(domains) - 1),
            "gather_x": 4 * count * (len(domains) - 1),
            "gather_o": 4 * count * (len(groups) - len(domains)),
            "gather_g": 4 * count * (len(islands) - len(groups)),
        }
        assert sums == {name: size for name, size in expected.items() if size}


def test_equal_islands_send_equal_shares():
    geometry = Geometry([(64, 16)], nest(8, 2, 4, 8))
    found = traffic(geometry, [range(1)], Wires(reduce_g="int8", update="int4"))
    assert encoded_bytes(256, "int8") == 260
    for rank in range(8):
        sent = {
            operation: sum(
                size for flow, size in found.items() if flow[:2] == (operation, rank)
            )
            for operation in ("reduce_g", "reduce_o", "gather_o", "gather_g")
        }
        assert sent == {
            "reduce_g": 256 + 4,
            "reduce_o": 4 * 128,
            "gather_o": 64 + 4,
            "gather_g": 2 * (64 + 4),
        }
    held = memory(geometry, Wires(reduce_o="int8"), 3, weight_bytes=2)
    assert held == (2 * 512, 4 * 256, 12 * 128, 4 * 128)


def test_what_does_not_nest_is_refused():
    for degrees in ((0, 1, 1), (2, 1, 4), (1, 2, 9)):
        with pytest.raises(ConfigError):
            nest(8, *degrees)
    with pytest.raises(ConfigError):
        Nesting(((0, 1),), ((0,), (1,)), ((0, 1),)).check()
    with pytest.raises(ConfigError):
        Nesting(((0,), (2,)), ((0, 2),), ((0, 2),)).check()


def test_overlap_is_what_both_hold():
    geometry = Geometry(SHAPES, nest(5, 2, 3, 5))
    for a, b in itertools.product(range(5), repeat=2):
        ours, theirs = geometry.cuts[ISLAND][a], geometry.cuts[GROUP][b]
        assert elements(overlap(ours, theirs)) == elements(ours) & elements(theirs)
        assert numel(overlap(ours, theirs)) == len(elements(ours) & elements(theirs))
