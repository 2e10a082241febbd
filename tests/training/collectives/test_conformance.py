"""The backend against gloo, in real processes."""

import os

import pytest

pytestmark = pytest.mark.slow

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))


@pytest.mark.parametrize("world", [3] if FACTOR == 1 else [2, 3, 4])
@pytest.mark.parametrize("seed", range(FACTOR))
def test_every_collective_equals_gloo(ranks, world, seed):
    found = ranks.run("conformance_program.py", world, seed, seconds=300)
    for rank in range(world):
        assert found[rank]["failures"] == []
        assert found[rank]["cases"] > 100
