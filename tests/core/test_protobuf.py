"""Golden bytes of Google's reference, round trips, hostile bytes."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from fabric.core.protobuf import (
    MAX_FIELDS,
    all_bytes,
    decode_message_untrusted,
    decode_varint_untrusted,
    encode_fixed64,
    encode_message,
    encode_varint,
    last_bytes,
    last_int,
)

FIELDS = st.lists(
    st.tuples(
        st.integers(1, 1 << 20), st.integers(0, 2**64 - 1) | st.binary(max_size=40)
    ),
    max_size=20,
)


def test_the_reference_examples():
    # the encoding reference: Test1 {a = 150}, Test2 {b = "testing"}
    assert encode_message([(1, 150)]).hex() == "089601"
    assert encode_message([(2, b"testing")]).hex() == "120774657374696e67"


@given(FIELDS)
def test_round_trip(fields):
    decoded = decode_message_untrusted(encode_message(fields))
    for number in {number for number, _ in fields}:
        assert decoded[number] == [v for n, v in fields if n == number]


@given(st.integers(0, 2**64 - 1))
def test_varints_and_fixed_integers(value):
    data = encode_varint(value)
    assert decode_varint_untrusted(data + b"x") == (value, len(data))
    assert decode_message_untrusted(encode_fixed64(3, value)) == {3: [value]}


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_fields_or_a_protocol_error(data):
    with contextlib.suppress(RemoteProtocolError):
        decode_message_untrusted(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x05abc",  # says five bytes, has three
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a length above 64 bits
        b"\x09\x01",  # half a fixed64
        b"\x0b",  # a group
        b"\x80" * 11,
        b"\x08\x01" * (MAX_FIELDS + 1),
    ],
)
def test_nasty_messages_are_refused(data):
    with pytest.raises(RemoteProtocolError):
        decode_message_untrusted(data)


def test_readers_take_the_last_value_and_check_its_type():
    fields = decode_message_untrusted(encode_message([(1, 5), (1, 6), (2, b"a")]))
    assert last_int(fields, 1) == 6
    assert last_int(fields, 9, 7) == 7
    assert last_bytes(fields, 2) == b"a"
    assert last_bytes(fields, 9) == b""
    with pytest.raises(RemoteProtocolError):
        all_bytes(fields, 1)
    with pytest.raises(RemoteProtocolError):
        last_int(fields, 2)
