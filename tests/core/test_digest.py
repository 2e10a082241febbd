"""Rendezvous order is one order everywhere, and stable under loss."""

from hypothesis import given
from hypothesis import strategies as st

from fabric.core.digest import BLOCK_BYTES, block_digests, digest, rendezvous_order

names = st.lists(st.text(max_size=5), unique=True, max_size=8)


@given(names, st.binary(max_size=8), st.randoms())
def test_order_ignores_input_order(items, key, random):
    shuffled = items[:]
    random.shuffle(shuffled)
    assert rendezvous_order(key, items) == rendezvous_order(key, shuffled)


@given(names.filter(bool), st.binary(max_size=8))
def test_removing_one_keeps_the_rest_in_order(items, key):
    order = rendezvous_order(key, items)
    assert rendezvous_order(key, items[1:]) == [n for n in order if n != items[0]]


def test_blocks():
    data = bytes(BLOCK_BYTES + 1)
    assert block_digests(data) == [digest(bytes(BLOCK_BYTES)), digest(b"\0")]
    assert block_digests(b"") == []
