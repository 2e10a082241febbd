"""Frames survive any cut of the stream; an announced giant is refused early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from fabric.core.framing import FrameReader, encode_frame


@given(st.lists(st.binary(max_size=50), max_size=10), st.data())
def test_any_cut(payloads, data):
    stream = b"".join(encode_frame(p) for p in payloads)
    reader = FrameReader(max_bytes=50)
    got = []
    while stream:
        n = data.draw(st.integers(1, len(stream)))
        got += reader.feed(stream[:n])
        stream = stream[n:]
    assert got == payloads


def test_oversized_is_refused_at_its_header():
    with pytest.raises(RemoteProtocolError, match="51 B > 50 B"):
        list(FrameReader(max_bytes=50).feed((51).to_bytes(4, "big")))
