import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.errors import ConfigError
from training.data import SHARD_BYTES, cut, order_key, split, unigram_entropy, windows


@settings(max_examples=40)
@given(st.binary(min_size=1, max_size=5 * SHARD_BYTES), st.floats(0.01, 0.9))
def test_split_is_a_partition_that_content_alone_decides(text, fraction):
    shards = cut(text)
    assert b"".join(shard.text for shard in shards) == text
    try:
        corpus = split(shards, fraction)
    except ConfigError:
        assert len({shard.name for shard in shards}) <= 1 or fraction > 0.05
        return
    assert {s.name for s in corpus.train}.isdisjoint(s.name for s in corpus.validation)
    assert sorted(s.name for s in corpus.train + corpus.validation) == sorted(
        s.name for s in shards
    )
    assert corpus.validation
    # the order of the source does not matter
    shuffled = split(tuple(reversed(shards)), fraction)
    assert set(shuffled.validation) == set(corpus.validation)


def test_about_the_wanted_share_is_held_out():
    shards = cut(
        b"".join(n.to_bytes(8, "big") * (SHARD_BYTES // 8) for n in range(1000))
    )
    held_out = len(split(shards, 0.1).validation)
    assert 70 <= held_out <= 130


def test_nothing_to_train_on_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="empty"):
        split((), 0.1)
    with pytest.raises(ConfigError, match="held out"):
        split(cut(b"abc"), 0.1)


def test_unigram_entropy_of_known_distributions():
    assert unigram_entropy(cut(b"a" * 100)) == 0
    assert unigram_entropy(cut(b"ab" * 100)) == pytest.approx(math.log(2))
    assert unigram_entropy(cut(bytes(range(256)) * 4)) == pytest.approx(math.log(256))


@settings(max_examples=40)
@given(
    st.integers(0, 2**53), st.integers(0, 99), st.text(max_size=9), st.integers(0, 99)
)
def test_windows_depend_on_the_key_alone_and_stay_inside_a_shard(
    seed, number, peer, step
):
    shards = cut(bytes(range(256)) * 200)
    key = order_key(seed, number, peer, step)
    first = windows(shards, key, 4, 33)
    assert first == windows(shards, key, 4, 33)
    assert first != windows(shards, order_key(seed, number, peer, step + 1), 4, 33)
    for window in first:
        assert len(window) == 33
        assert any(window in shard.text for shard in shards)


def test_a_window_longer_than_every_shard_is_refused():
    with pytest.raises(ConfigError, match="no shard holds"):
        windows(cut(b"short"), "key", 1, 6)
    assert windows(cut(b"short"), "key", 1, 5) == [b"short"]
