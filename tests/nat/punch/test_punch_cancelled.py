"""Both ends of a punch end at any step: no socket is left."""

import random

import pytest
import trio

from nat.punch.config import PunchConfig
from tests.cancelling import cancelled_after, open_sockets
from tests.nat.punch.punch_pair import pair

# the other end holds what it accepted until the end of the test
SPARES = PunchConfig(
    bulk_sockets=2, inbound_burst=10_000, max_accepted_sockets_per_peer=10_000
)


async def punch_twice(one, two):
    """The second is a spare that the first left."""
    for _ in range(2):
        (await one.puncher.punch(two.peer)).close()
        while one.puncher.num_spares(two.peer) == 0:  # noqa: ASYNC110
            await trio.sleep(0.001)


async def drop_accepted(end):
    while end.accepted.statistics().current_buffer_used:
        await (await end.accepted.receive()).aclose()


async def length():
    """Return how many steps it takes undisturbed."""
    with cancelled_after(1 << 30) as counter:
        async with pair(SPARES) as (one, two):
            await punch_twice(one, two)
    return (1 << 30) - counter.left


@pytest.mark.slow
async def test_nothing_stays_open_wherever_both_ends_are_cancelled():
    before, steps = open_sockets(), await length()
    assert open_sockets() == before
    rng = random.Random(8)
    for _ in range(80):
        at = rng.randrange(1, steps)
        with cancelled_after(at):
            async with pair(SPARES) as (one, two):
                await punch_twice(one, two)
        assert open_sockets() == before, f"cancelled at step {at} of {steps}"


@pytest.mark.slow
async def test_what_a_caller_left_behind_is_a_spare_or_closed():
    async with pair(SPARES) as (one, two):
        with cancelled_after(1 << 30) as counter:
            await punch_twice(one, two)
        steps = (1 << 30) - counter.left
        rng = random.Random(9)
        for _ in range(40):
            await drop_accepted(two)
            with cancelled_after(rng.randrange(1, steps)):
                await punch_twice(one, two)
    # their ends and spares are closed with the pair; ResourceWarnings are errors
