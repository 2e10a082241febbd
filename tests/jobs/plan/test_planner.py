"""Plans: they fit, nothing legal is better, and each loser says what it lost by."""

import json
import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.jobs.plan.baselines import as_written, flat, three_level, two_level
from fabric.jobs.plan.partitions import partitions
from fabric.jobs.plan.planner import EQUAL, EQUAL_OUTER, find_plan, nested, price
from fabric.jobs.plan.replication import replication_of
from fabric.jobs.plan.schemes import PlanSettings
from fabric.jobs.plan.shapes import builtin_shape, shape_of, uniform_shape
from fabric.jobs.plan.times import Flows, link_bytes
from fabric.jobs.plan.verdicts import with_reasons
from fabric.jobs.spec import ModelSpec
from tests.jobs.plan.grounds import ground, shapes

few = settings(max_examples=8, deadline=None)
GPT = uniform_shape(13_800_000, 6, 384, 64, 8192)
"""The model whose bytes were measured between two namespaces (research notes)."""
SITES = (2, 2)


def test_the_built_in_model_has_the_parameters_it_has():
    shape = builtin_shape(ModelSpec())
    assert shape.numel == 1_049_984
    assert (shape.num_blocks, shape.hidden_size, shape.vocabulary) == (5, 128, 256)
    assert shape.units == 6
    assert shape_of({"a": (3, 4), "b": ()}).numel == 13


@pytest.mark.parametrize(
    ("kind", "precision", "measured_mb"),
    [
        ("hsdp", "fp32", 55),
        ("hsdp", "int8", 14),
        ("outer", "fp32", 5.5),
        ("outer", "int8", 1.4),
    ],
)
def test_bytes_over_the_slow_link_are_those_that_were_measured(
    kind, precision, measured_mb
):
    """Per step and site, as counted on the link of one of two sites of two ranks."""
    where, asked = ground(SITES), PlanSettings()
    flows = Flows(where)
    scheme = msgspec.structs.replace(
        two_level(flows, asked), gradient_precision=precision
    )
    if kind == "outer":
        scheme = msgspec.structs.replace(
            scheme, sync=scheme.optimizer, inner_steps=10, outer_precision=precision
        )
    rows = {row[0]: row for row in link_bytes(flows, GPT, scheme, asked)}
    for site in ("p0", "p1"):
        for moved in rows[site][2:]:
            assert moved / 1e6 == pytest.approx(measured_mb, rel=0.03)


@few
@given(shapes, st.integers(1, 40), st.sampled_from(["auto", "exact", "outer"]))
def test_the_plan_fits_and_nothing_that_fits_is_faster(shape, mebibytes, mode):
    where = ground(shape, memory=mebibytes << 20)
    asked = PlanSettings(mode=mode)
    model = builtin_shape(ModelSpec())
    plan = with_reasons(find_plan(where, model, asked), where, asked)
    assert len(plan.options) <= plan.considered
    for option in plan.options:
        scheme = option.scheme
        assert scheme.weights.is_within(scheme.gradients)
        assert scheme.gradients.is_within(scheme.optimizer)
        assert scheme.optimizer.is_within(scheme.sync)
        assert option.fits == (option.memory.total <= mebibytes << 20)
        assert option.why
        assert (
            mode == "auto"
            or where.root.size == 1
            or scheme.is_exact == (mode == "exact")
        )
    fitting = [option for option in plan.options if option.fits]
    if plan.best is None:
        assert not fitting
        return
    assert plan.best.fits
    assert sum(option.chosen for option in plan.options) == 1
    rivals = [o for o in fitting if o.scheme.is_exact == plan.best.scheme.is_exact]
    band = EQUAL if plan.best.scheme.is_exact else EQUAL * EQUAL_OUTER
    assert plan.best.cost.seconds <= band * min(o.cost.seconds for o in rivals)


def test_sharding_farther_never_needs_more_memory():
    where, asked = ground(((2, 2), (2, 2))), PlanSettings(mode="exact")
    flows = Flows(where)
    parts = partitions(where)
    for held, reduced, states in nested(parts):
        scheme = msgspec.structs.replace(
            flat(flows, asked), weights=held, gradients=reduced, optimizer=states
        )
        mine = price(flows, GPT, scheme, asked).memory
        assert mine.optimizer in {
            -(-GPT.numel // size) * each
            for size in [int(states.degree)]
            for each in (8, 12)
        }
        for wider in parts:
            if states.is_within(wider):
                farther = msgspec.structs.replace(scheme, optimizer=wider)
                theirs = price(flows, GPT, farther, asked).memory
                assert theirs.gradients == mine.gradients
                if held.stops != states.stops:
                    assert theirs.optimizer <= mine.optimizer


@few
@given(shapes, st.sampled_from(["fp32", "int8"]))
def test_level_bytes_are_the_sum_of_what_its_links_carry(shape, precision):
    where, asked = ground(shape), PlanSettings()
    flows = Flows(where)
    scheme = msgspec.structs.replace(
        three_level(flows, asked),
        weight_precision=precision,
        gradient_precision=precision,
    )
    option = price(flows, GPT, scheme, asked)
    links = link_bytes(flows, GPT, scheme, asked)
    taken = sum(row[2] for row in links if row[1] == 0)
    crossed = sum(option.cost.level_bytes)
    # what ranks take in is what was moved at the level where it came from
    assert taken == pytest.approx(crossed, rel=1e-6)


def test_three_levels_beat_two_and_flat_where_the_middle_is_slow():
    """2 sites x 2 hosts x 2 ranks, 20 Mbit/s between sites: the order of the paper."""
    where = ground(((2, 2), (2, 2)), rates=(2e9, 1.1e8, 2.5e6))
    asked = PlanSettings(
        tokens_per_step=8 * 64 * 4, micro_steps=(4,), recompute=(False,)
    )
    flows = Flows(where)
    three = msgspec.structs.replace(
        three_level(flows, asked), weight_precision="int8", gradient_precision="int8"
    )
    seconds = [
        price(flows, GPT, scheme, asked).cost.seconds
        for scheme in (three, two_level(flows, asked), flat(flows, asked))
    ]
    assert seconds == sorted(seconds)
    assert seconds[2] > 4 * seconds[0]
    assert seconds[1] > 1.7 * seconds[0]
    plain = price(flows, GPT, two_level(flows, asked), asked)
    assert price(flows, GPT, three, asked).memory.optimizer < plain.memory.optimizer


def test_an_outer_loop_is_taken_where_links_are_slow_and_not_where_they_are_fast():
    asked = PlanSettings(tokens_per_step=4 * 64 * 8)
    slow, fast = ((2e9, 6.25e6), (2e9, 1e9))
    plan = find_plan(ground(SITES, rates=slow), GPT, asked)
    assert not plan.best.scheme.is_exact
    assert plan.best.scheme.sync.degree == "2"
    steps = plan.best.scheme.inner_steps
    share = plan.best.cost.outer_seconds / steps / plan.best.cost.seconds
    assert 1 < steps <= 50
    assert share <= 0.1
    quick = find_plan(ground(SITES, rates=fast), GPT, asked)
    assert quick.best.scheme.is_exact


def test_a_larger_model_is_sharded_farther_and_none_fits_at_last():
    degrees = []
    for gib in (16, 6, 3, 1):
        where = ground(((2, 2), (2, 2)), memory=gib << 30)
        asked = PlanSettings(mode="exact", dtype="bf16")
        model = uniform_shape(1_000_000_000, 24, 2048, 1024, 32000)
        plan = with_reasons(find_plan(where, model, asked), where, asked)
        degrees.append(plan.best and plan.best.scheme.optimizer.degree)
        assert all(
            re.match(r"needs .* has .* are \w+", option.why)
            for option in plan.options
            if not option.fits
        )
    assert degrees[-1] is None
    known = [int(degree) for degree in degrees[:-1] if degree]
    assert known == sorted(known)


def test_the_tightest_rank_decides_where_memory_is_uneven():
    small = (8 << 30,) * 3 + (3 << 29,)
    where = ground((2, 2), memory=small)
    model = uniform_shape(100_000_000, 12, 1024, 512, 0)
    plan = find_plan(where, model, PlanSettings(mode="exact"))
    assert plan.best.memory.rank == "r1.1"


def test_what_a_loss_costs_is_said():
    where = ground(((2, 2), (2, 2)))
    flows, asked = Flows(where), PlanSettings(inner_steps=10)
    exact = price(flows, GPT, three_level(flows, asked), asked)
    inside, across = replication_of(where, GPT, exact.scheme, exact.cost, asked)
    assert (inside.every_steps, inside.bytes_each) == (1, 4 * 13_800_000 // 8)
    assert inside.loss == "at most one step"
    assert across.every_steps > 0
    assert across.bytes_each == 12 * 13_800_000 // 2
    today = price(flows, GPT, as_written(flows, asked, 10, "int8"), asked)
    inside, across = replication_of(where, GPT, today.scheme, today.cost, asked)
    assert inside.covered
    assert "round of 10" in across.loss
    alone = ground((2, 2), levels=("host", "internet"))
    flows = Flows(alone)
    option = price(flows, GPT, two_level(flows, asked), asked)
    rows = replication_of(alone, GPT, option.scheme, option.cost, asked)
    assert rows[-1].covered


def test_golden_plan_of_two_sites():
    """The numbers of one plan, so that a change of the model is seen and meant."""
    where = ground(((2, 2), (2, 2)), rates=(2e9, 1.1e8, 1.25e7), memory=1 << 30)
    asked = PlanSettings(tokens_per_step=2048, micro_steps=(1, 2))
    plan = find_plan(where, GPT, asked)
    assert plan == find_plan(where, GPT, asked)
    rows = [
        [
            option.scheme.degrees,
            option.scheme.sync.degree,
            option.scheme.inner_steps,
            option.scheme.weight_precision,
            option.scheme.gradient_precision,
            option.memory.total >> 20,
            round(option.cost.seconds, 2),
            [size >> 10 for size in option.cost.level_bytes],
        ]
        for option in (plan.best, *plan.options[:3])
    ]
    assert json.loads(json.dumps(rows)) == GOLDEN


GOLDEN = [
    ["1|1|2", "2", 100, "fp32", "fp32", 426, 0.29, [431250, 547, 1094]],
    ["1|1|1", "2", 100, "fp32", "fp32", 439, 0.29, [431250, 547, 1094]],
    ["1|1|2", "2", 100, "fp32", "fp32", 426, 0.29, [431250, 547, 1094]],
    ["1|2|2", "2", 100, "fp32", "fp32", 444, 0.29, [431250, 547, 1094]],
]
