"""The one door for peer bytes raises one exception type."""

from contextlib import suppress
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.codec import Codec
from fabric.core.errors import RemoteProtocolError


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    text: Annotated[str, msgspec.Meta(max_length=10)] = ""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    data: Annotated[bytes, msgspec.Meta(max_length=10)] = b""


CODEC: Codec[Ping | Pong] = Codec(Ping | Pong, max_bytes=100_000)


@given(st.text(max_size=10) | st.binary(max_size=10))
def test_round_trip(value):
    message = Ping(value) if isinstance(value, str) else Pong(value)
    assert CODEC.decode_untrusted(CODEC.encode(message)) == message


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data):
    with suppress(RemoteProtocolError):
        CODEC.decode_untrusted(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\xa4type\xa4ping\xa1x" + b"\x91" * 50_000 + b"\x00",  # deep nesting
        b"\x82\xa4type\xa4ping\xa4text\xa3\xff\xfe\xfd",  # bad UTF-8
        CODEC.encode(Ping("ok")) + b"\x00",  # trailing bytes
        CODEC.encode(Ping("a longer text")),  # over its bound
        b"\x81\xa4type\xa4what",  # unknown tag
        b"\xdf\xff\xff\xff\xff",  # announces 2^32 pairs
        b"\xc0" * 100_001,  # oversized
    ],
    ids=["deep", "utf8", "trailing", "long", "tag", "huge", "oversized"],
)
def test_hostile_bytes(data):
    with pytest.raises(RemoteProtocolError):
        CODEC.decode_untrusted(data)
