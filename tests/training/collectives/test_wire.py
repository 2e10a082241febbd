"""The doors: whatever bytes come, a value or RemoteProtocolError."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from training.worker.collectives.choose import PIECE_BYTES
from training.worker.collectives.connect import (
    _read_address_untrusted,
    _read_hello_untrusted,
)
from training.worker.collectives.line import check_rank_untrusted
from training.worker.collectives.wire import (
    HEAD_BYTES,
    WORD_BYTES,
    Head,
    Kind,
    decode_head_untrusted,
    decode_word_untrusted,
    encode_word,
)

DOORS = [
    decode_head_untrusted,
    decode_word_untrusted,
    _read_address_untrusted,
    lambda data: _read_hello_untrusted(data, 4),
]


@pytest.mark.parametrize("door", DOORS)
@given(
    data=st.binary(max_size=64)
    | st.binary(min_size=HEAD_BYTES, max_size=HEAD_BYTES)
    | st.binary(min_size=WORD_BYTES, max_size=WORD_BYTES)
    | st.binary(min_size=20, max_size=20)
)
def test_any_bytes(door, data):
    try:
        door(data)
    except RemoteProtocolError:
        return


@given(
    kind=st.sampled_from([Kind.PIECE, Kind.SLOT]),
    tag=st.integers(0, 2**32 - 1),
    sequence=st.integers(0, 2**64 - 1),
    value=st.integers(0, 2**32 - 1),
    length=st.integers(0, PIECE_BYTES),
)
def test_heads_come_back(kind, tag, sequence, value, length):
    head = Head(kind, tag, sequence, value, length)
    assert decode_head_untrusted(head.encode()) == head


@pytest.mark.parametrize(
    "head",
    [
        Head(Kind.PIECE, length=PIECE_BYTES + 1),
        Head(Kind.BEAT, length=1),
        Head(Kind.FREE),
    ],
)
def test_refused_heads(head):
    with pytest.raises(RemoteProtocolError):
        decode_head_untrusted(head.encode())


def test_words_come_back():
    assert decode_word_untrusted(encode_word(Kind.FREE, 3)) == (Kind.FREE, 3)
    with pytest.raises(RemoteProtocolError):
        decode_word_untrusted(encode_word(Kind.BYE))


def test_ranks_of_other_groups():
    assert check_rank_untrusted(-1, 2) == -1
    with pytest.raises(RemoteProtocolError):
        check_rank_untrusted(2, 2)
