"""Messages behind a varint length: whole, one at a time, and never more than agreed."""

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.protobuf import delimited
from fabric.net.delimited import MessageStream, receive_message_untrusted

MAX = 300


async def read(data, max_bytes=MAX, pieces=None):
    """Return the message at the start of ``data``, and what is left of the stream."""
    near, far = trio.testing.memory_stream_pair()
    for start in range(0, len(data), pieces or len(data)):
        await near.send_all(data[start : start + (pieces or len(data))])
    await near.send_eof()
    message = await receive_message_untrusted(far, max_bytes)
    return message, b"".join([part async for part in far])


@given(st.binary(max_size=MAX), st.binary(max_size=20), st.integers(1, 7))
def test_a_message_is_read_whole_and_not_a_byte_more(message, rest, pieces):
    data = delimited(message) + rest
    assert trio.run(read, data, MAX, pieces) == (message, rest)


@given(st.binary(max_size=400))
def test_any_bytes_give_a_message_or_an_error_of_ours(data):
    try:
        message, rest = trio.run(read, data or b"\x00")
    except (RemoteProtocolError, Unavailable):
        return
    assert len(message) <= MAX
    assert (data or b"\x00").endswith(rest)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x81\x20", b"\xff" * 20])
async def test_a_length_above_the_limit_is_refused_from_its_first_bytes(data):
    with pytest.raises(RemoteProtocolError):
        await read(data)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", Unavailable),
        (b"\x81", RemoteProtocolError),
        (b"\x05abcd", RemoteProtocolError),
    ],
)
async def test_the_end_before_a_message_is_nobodys_fault_inside_it_the_peers(
    data, error
):
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(data)
    await near.send_eof()
    with pytest.raises(error):
        await receive_message_untrusted(far, MAX)


async def test_many_in_both_directions_and_a_broken_stream():
    near, far = trio.testing.memory_stream_pair()
    ours, theirs = MessageStream(near, MAX), MessageStream(far, MAX)
    for message in (b"", b"one", b"x" * MAX):
        await ours.send(message)
    for message in (b"", b"one", b"x" * MAX):
        assert await theirs.receive_untrusted() == message
    await far.aclose()
    with pytest.raises(Unavailable):
        await ours.send(b"too late")
    with pytest.raises(Unavailable):
        await theirs.receive_untrusted()
