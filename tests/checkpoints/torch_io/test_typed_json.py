"""Python values as JSON: exactly the same back, or a refusal that names the place."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.manifest import check_json
from checkpoints.typed_json import from_json, to_json
from fabric.core.errors import ConfigError, IntegrityError

keys = st.one_of(st.text(max_size=5), st.integers(), st.sampled_from(["$tuple", "$x"]))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(max_size=9),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b


@given(values)
def test_what_is_read_is_what_was_written(value):
    written = to_json(value)
    check_json(written)
    assert same(from_json(json.loads(json.dumps(written))), value)


class Secret:
    pass


@pytest.mark.parametrize(
    "value", [Secret(), {1, 2}, 1j, range(3), [Secret], bytearray(b"a")]
)
def test_what_json_cannot_hold_is_named(value):
    with pytest.raises(ConfigError) as refused:
        to_json({"scheduler": [value]})
    assert refused.value.code == "E_NOT_JSON"
    assert "state.scheduler[0]" in refused.value.reason


def test_a_leaf_of_the_callers_own():
    written = to_json([1j], leaf=lambda v, _: {"$complex": [v.real, v.imag]})
    assert from_json(written, lambda key, body: complex(*body)) == [1j]
    with pytest.raises(IntegrityError):
        from_json(written)


def test_bottomless_nesting_is_refused():
    value = []
    value.append(value)
    with pytest.raises(ConfigError):
        to_json(value)


@pytest.mark.parametrize(
    "hostile",
    [
        {"$bytes": "zz"},
        {"$tuple": 3},
        {"$int": []},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$eval": "1"},
    ],
)
def test_hostile_json_is_a_typed_error(hostile):
    with pytest.raises(IntegrityError):
        from_json(hostile)
