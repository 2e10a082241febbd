"""A soak goes on where the lines of its commit end."""

import pytest

from tests.soak.__main__ import next_step


def row(seed, **path):
    return {"seed": seed, "passed": True, **path}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], (1, "a")),
        ([row(1, path="a")], (1, "b")),
        ([row(1, path="a"), row(1, path="b")], (2, "a")),
        ([row(1, path="b")], (1, "a")),
        ([row(3)], (4, "a")),
    ],
)
def test_the_next_step(rows, expected):
    assert next_step(rows, ["a", "b"]) == expected
