"""Islands and levels: found where they are, equal everywhere, unmoved by noise."""

import math
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.link_records import LinkRecord, PublishedLink
from fabric.core.ids import PeerId
from fabric.jobs.topology.distances import DOUBLING, distance, log2_fixed, merge
from fabric.jobs.topology.islands import topology_of
from fabric.jobs.topology.reasons import reasons
from fabric.jobs.topology.watch import TopologyWatch
from tests.jobs.topology.worlds import (
    FAR,
    LAN,
    WAN,
    cuts_of,
    links_of,
    peers,
    records_of,
)

SHAPES = [
    4,
    (2, 2),
    (3, 1, 2),
    ((2, 2), (2, 1)),
    ((4, 4), (3,), (2, 2)),
    (((2, 2), (2,)), ((2, 3), (1, 1))),
]
SOAKING = int(os.environ.get("SOAK_FACTOR", "1")) > 1
few = settings(max_examples=12)
NOISE = 1.12
"""A distance moves by 1.12 ** 1.5 = 1.19 and a leap by 1.19 ** 2 = 1.41, at most."""


@given(st.integers(1, 1 << 60))
def test_log2_without_floats_is_log2(value):
    assert 0 <= math.log2(value) * DOUBLING - log2_fixed(value) < 1 + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_are_found_where_the_links_leap(shape):
    found = topology_of(records_of(links_of(shape)), peers(shape))
    assert found.cuts == cuts_of(shape)
    assert all(each.leap > 3 for each in found.root.walk() if each.level and each.leap)
    for level in range(found.root.level + 1):
        at = found.root.at(level)
        assert sorted(p for each in at for p in each.members) == sorted(peers(shape))


def test_islands_of_one_job_may_have_levels_of_their_own():
    shape = ((2, 2), (1, 1, 1))  # a site with hosts of two, a site of single machines
    root = topology_of(records_of(links_of(shape)), peers(shape)).root
    assert [each.level for each in root.children] == [2, 1]
    assert [each.kind for each in root.children] == ["site", "site"]
    assert root.kind == "internet"
    assert [len(each.members) for each in root.at(1)] == [2, 2, 3]


@few
@given(st.sampled_from(SHAPES), st.randoms(use_true_random=False), st.floats(0, 0.6))
def test_every_peer_finds_the_same(shape, rng, missing):
    records = records_of(links_of(shape), noise=2.0, rng=rng, missing=missing)
    found = topology_of(records, peers(shape))
    names = list(records)
    rng.shuffle(names)
    again = topology_of(
        {
            name: LinkRecord(links=dict(reversed(records[name].links.items())))
            for name in names
        },
        reversed(list(peers(shape))),
    )
    assert again == found


@few
@given(st.randoms(use_true_random=False), st.floats(0, 1))
def test_it_does_not_matter_which_end_measured(rng, missing):
    """A record moved to the other end of its link, directions swapped, is the same."""
    links = links_of((2, 3))
    records = records_of(links, noise=3.0, rng=rng, missing=missing)
    mirrored = {}
    for author, record in records.items():
        for other, link in record.links.items():
            mirrored.setdefault(other, {})[author] = PublishedLink(
                rtt_microseconds=link.rtt_microseconds,
                up_bytes_per_second=link.down_bytes_per_second,
                down_bytes_per_second=link.up_bytes_per_second,
            )
    turned = {peer: LinkRecord(links=found) for peer, found in mirrored.items()}
    assert merge(turned, peers((2, 3))) == merge(records, peers((2, 3)))


def test_the_worse_of_two_ends_counts_and_a_liar_gains_nothing():
    one, two = PeerId("a"), PeerId("b")
    honest = PublishedLink(
        rtt_microseconds=20_000, up_bytes_per_second=100, down_bytes_per_second=0
    )
    liar = PublishedLink(
        rtt_microseconds=1, up_bytes_per_second=7, down_bytes_per_second=10**12
    )
    records = {one: LinkRecord(links={two: honest}), two: LinkRecord(links={one: liar})}
    _, links = merge(records, (one, two, PeerId("c")))
    link = links[one, two]
    assert (link.rtt_microseconds, link.there, link.back) == (20_000, 100, 7)
    assert link.is_disputed
    _, alone = merge({one: records[one]}, (one, two))
    assert alone[one, two].back == 0  # not measured is not slow
    assert distance(alone[one, two]) is not None


def test_who_was_not_measured_stands_apart_and_is_named():
    links = {p: v for p, v in links_of((2, 2)).items() if PeerId("p1.1") not in p}
    found = topology_of(records_of(links), peers((2, 2)))
    alone = [each for each in found.root.children if each.members == ("p1.1",)]
    assert found.root.kind == "unmeasured"
    assert len(alone) == 1
    assert any("p1.1" in line and "measured" in line for line in reasons(found, str))


@few
@given(st.sampled_from(SHAPES), st.randoms(use_true_random=False))
def test_a_third_of_the_pairs_is_enough_when_records_are_full(shape, rng):
    """Peers measure at most 32 others: most pairs of a large job are missing."""
    everything = links_of(shape)
    pairs = sorted({tuple(sorted(pair)) for pair in everything})
    keep = {pair for pair in pairs if rng.random() < 0.9}
    links = {p: v for p, v in everything.items() if tuple(sorted(p)) in keep}
    found = topology_of(records_of(links, noise=1.05, rng=rng), peers(shape))
    for island in found.cuts:  # whatever is missing, no island is one that is not there
        if found.root.kind != "unmeasured":
            assert any(island <= real for real in (*cuts_of(shape), set(peers(shape))))


@few
@given(st.sampled_from(SHAPES), st.integers(0, 2**32), st.integers(2, 6))
def test_noise_within_the_band_moves_nothing(shape, seed, rounds):
    rng = random.Random(seed)
    first = topology_of(records_of(links_of(shape), noise=NOISE, rng=rng), peers(shape))
    cuts = first.cuts
    assert cuts == cuts_of(shape)
    for _ in range(rounds):
        records = records_of(links_of(shape), noise=NOISE, rng=rng)
        assert topology_of(records, peers(shape), cuts).cuts == cuts


@few
@given(st.integers(0, 2**32), st.booleans())
def test_a_leap_near_the_threshold_does_not_flicker(seed, was_cut):
    rng = random.Random(seed)
    middle = (1_000, round(LAN[1] / 2.45))  # a leap of 2.45
    links = links_of((2, 2), (middle, LAN))
    cuts = cuts_of((2, 2)) if was_cut else frozenset()
    for _ in range(5):
        records = records_of(links, noise=1.03, rng=rng)
        after = topology_of(records, peers((2, 2)), cuts).cuts
        assert after == cuts
        cuts = after


@few
@given(st.integers(0, 2**32))
def test_a_real_change_moves_it_once(seed):
    rng = random.Random(seed)
    watch = TopologyWatch(quiet_seconds=100)
    before, after = links_of((4,)), links_of((2, 2), (FAR, LAN))
    renamed = dict(zip(sorted(peers((2, 2))), sorted(peers((4,))), strict=True))
    after = {(renamed[a], renamed[b]): v for (a, b), v in after.items()}
    moves = []
    for step in range(20):
        links = before if step < 8 else after
        records = records_of(links, noise=NOISE, rng=rng)
        if watch.look(records, peers((4,)), step * 60.0):
            moves.append(step)
    assert moves == [0, 10]
    assert len(watch.topology.cuts) == 2


def test_records_that_come_one_by_one_move_it_once():
    names = sorted(peers((2, 2)))
    lan = dict.fromkeys(links_of((2, 2)), LAN)
    old, new = records_of(lan), records_of(links_of((2, 2), (FAR, WAN)))
    watch = TopologyWatch(quiet_seconds=120)
    moves, records = 0, dict(old)
    for minute in range(12):
        if 3 <= minute < 3 + len(names):
            records[names[minute - 3]] = new[names[minute - 3]]
        moves += watch.look(records, names, minute * 60.0)
    assert moves == 2  # the first, and the change
    assert watch.topology.cuts == cuts_of((2, 2))


def test_who_comes_or_goes_leaves_the_cuts_of_the_others():
    near = (1_000, round(LAN[1] / 2.3))
    links = links_of((3, 3), (near, LAN))
    rest = sorted(peers((3, 3)))[1:]
    cuts = topology_of(records_of(links), peers((3, 3)), cuts_of((3, 3))).cuts
    assert cuts == cuts_of((3, 3))
    fewer = topology_of(records_of(links), rest, cuts).cuts
    assert fewer == {frozenset(rest) & island for island in cuts}
    assert topology_of(records_of(links), peers((3, 3)), fewer).cuts == cuts


def test_each_cut_has_a_reason():
    shape = ((2, 2), (2, 1))
    found = topology_of(records_of(links_of(shape)), peers(shape))
    lines = reasons(found, str)
    assert len(lines) == len(found.cuts)
    assert "p0.0.0, p0.0.1, p0.1.0, p0.1.1 stay together" in lines[0]
    assert "a leap of" in lines[0]
    flat = topology_of(records_of(links_of(3)), peers(3))
    assert reasons(flat, str)[0].startswith("no cut: ")
    assert reasons(topology_of({}, ["a"]), str) == ("a is alone",)


@pytest.mark.slow
def test_islands_of_a_large_job_are_found_from_32_links_each():
    """Half of them to peers of the same site, as probes are dealt out."""
    shape = (25,) * (40 if SOAKING else 10)
    paths, rng = peers(shape), random.Random(7)
    names = sorted(paths)
    links = {}
    for one in names:
        site = [p for p in names if paths[p][0] == paths[one][0] and p != one]
        for other in rng.sample(site, 16) + rng.sample(names, 16):
            if other != one:
                near = paths[other][0] == paths[one][0]
                links[one, other] = LAN if near else WAN
    found = topology_of(records_of(links, noise=NOISE, rng=rng), names)
    assert found.cuts == cuts_of(shape)
    assert found.root.level == 2
