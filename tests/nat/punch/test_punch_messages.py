"""Golden vectors of both protocols, and hostile bytes at their doors."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import NoRoute, RemoteProtocolError, RemoteRefused
from fabric.core.protobuf import decode_varint_untrusted
from nat.punch.facts import NatFacts
from nat.punch.messages import (
    CONNECT,
    MAX_DCUTR_BYTES,
    PUNCH,
    SYNC,
    HolePunch,
    PunchConnect,
    PunchRefused,
    PunchSync,
    decode_hole_punch_untrusted,
    encode_hole_punch,
)


def test_golden_connect_and_sync():
    connect = HolePunch(CONNECT, ("/ip4/192.0.2.1/tcp/4801",))
    assert encode_hole_punch(connect).hex() == "0c" + "0864" + "120804c00002010612c1"
    assert encode_hole_punch(HolePunch(SYNC)).hex() == "03" + "08ac02"


def test_golden_fabric_messages():
    message = PunchConnect(
        nonce=bytes(16), addresses=("192.0.2.1:5000",), facts=NatFacts(port_step=1)
    )
    assert PUNCH.encode(message).hex() == (
        "86a4" + b"type".hex() + "a7" + b"connect".hex()
        + "a5" + b"nonce".hex() + "c410" + "00" * 16
        + "a9" + b"addresses".hex() + "91ae" + b"192.0.2.1:5000".hex()
        + "a9" + b"listeners".hex() + "90"
        + "a5" + b"facts".hex() + "84"
        + "a7" + b"mapping".hex() + "a7" + b"unknown".hex()
        + "a9" + b"filtering".hex() + "a7" + b"unknown".hex()
        + "a6" + b"public".hex() + "c2"
        + "a9" + b"port_step".hex() + "01"
        + "ac" + b"held_seconds".hex() + "cb" + "00" * 8
    )  # fmt: skip
    assert PUNCH.encode(PunchSync()).hex() == "81a4" + b"type".hex() + "a4" + (
        b"sync".hex()
    )


@given(
    st.sampled_from([CONNECT, SYNC]),
    st.lists(st.integers(0, 65535), max_size=8, unique=True),
)
def test_round_trip(kind, ports):
    message = HolePunch(kind, tuple(f"/ip4/192.0.2.9/tcp/{p}" for p in ports))
    data = encode_hole_punch(message)
    size, start = decode_varint_untrusted(data)
    assert len(data) == start + size
    assert decode_hole_punch_untrusted(data[start:]) == message


@given(st.binary(max_size=200))
def test_any_bytes_at_the_doors(data):
    with contextlib.suppress(RemoteProtocolError):
        decode_hole_punch_untrusted(data)
    with contextlib.suppress(RemoteProtocolError):
        PUNCH.decode_untrusted(data)


def test_limits():
    with pytest.raises(RemoteProtocolError):
        decode_hole_punch_untrusted(bytes(MAX_DCUTR_BYTES + 1))
    with pytest.raises(RemoteProtocolError):
        decode_hole_punch_untrusted(bytes.fromhex("0801"))  # no such type
    nine = PunchConnect(nonce=bytes(16), addresses=("192.0.2.1:1",) * 9)
    for bad in (nine, PunchConnect(nonce=bytes(15)), PunchConnect(nonce=bytes(17))):
        with pytest.raises(RemoteProtocolError):
            PUNCH.decode_untrusted(PUNCH.encode(bad))


def test_refusals_become_errors_of_the_right_kind():
    refused = PunchRefused.of(NoRoute("r" * 900, code="E_PUNCH_BUSY", next_step="wait"))
    assert isinstance(refused.as_error(), NoRoute)
    assert len(refused.reason) == 500
    assert isinstance(PunchRefused("E_X", "no").as_error(), RemoteRefused)
