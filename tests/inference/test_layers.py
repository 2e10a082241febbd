import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.layers import chain, layer_range


@given(st.integers(1, 200), st.data())
def test_stages_tile_the_layers_evenly(num_layers, data):
    stages = data.draw(st.integers(1, num_layers))
    ranges = [layer_range(num_layers, stage, stages) for stage in range(stages)]
    assert [i for r in ranges for i in r] == list(range(num_layers))
    sizes = {len(r) for r in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_more_stages_than_layers_is_refused():
    with pytest.raises(ValueError, match="over 2 layers"):
        layer_range(2, 0, 3)


def test_the_chain_is_the_same_everywhere():
    assert chain(["c", "a", "b"], 2) == ("a", "b")
    assert chain(["a"], 2) == ()
