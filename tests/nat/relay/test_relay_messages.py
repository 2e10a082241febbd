"""Relay v2 on the wire: py-libp2p's bytes, and a safe door."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.envelope import unmarshal_envelope
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr

from fabric.core.errors import RemoteProtocolError
from fabric.core.protobuf import decode_varint_untrusted, encode_message
from fabric.core.signing import Ed25519Signer
from nat.relay.messages import (
    MAX_RELAY_MESSAGE_BYTES,
    HopConnect,
    HopReserve,
    HopStatus,
    Limit,
    Reservation,
    Status,
    StopConnect,
    StopStatus,
    decode_hop_untrusted,
    decode_stop_untrusted,
    encode_hop,
    encode_stop,
    peer_to_bytes,
    status_name,
)
from nat.relay.voucher import VOUCHER, seal_voucher

RELAY = Ed25519Signer(bytes(range(32)))
PEER = Ed25519Signer(bytes(32)).peer_id
ADDR = f"/ip4/203.0.113.7/tcp/4801/p2p/{RELAY.peer_id}"
LIMIT = Limit(duration_seconds=120, data_bytes=1 << 17)


def body_of(data):
    size, start = decode_varint_untrusted(data)
    assert len(data) == start + size
    return data[start:]


def reservation(**kwargs):
    return Reservation(
        expires_unix_seconds=1_800_000_000, addrs=(ADDR,), voucher=b"v" * 8, **kwargs
    )


GOLDEN_HOP = [
    (HopReserve(), pb.HopMessage(type=pb.HopMessage.RESERVE)),
    (
        HopConnect(PEER),
        pb.HopMessage(
            type=pb.HopMessage.CONNECT, peer=pb.PeerId(id=peer_to_bytes(PEER))
        ),
    ),
    (
        HopStatus(status=Status.NO_RESERVATION),
        pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.Status.NO_RESERVATION),
    ),
    (
        HopStatus(status=Status.OK, reservation=reservation(), limit=LIMIT),
        pb.HopMessage(
            type=pb.HopMessage.STATUS,
            status=pb.Status.OK,
            reservation=pb.Reservation(
                expire=1_800_000_000,
                addrs=[Multiaddr(ADDR).to_bytes()],
                voucher=b"v" * 8,
            ),
            limit=pb.Limit(duration=120, data=1 << 17),
        ),
    ),
]
GOLDEN_STOP = [
    (
        StopConnect(PEER, LIMIT),
        pb.StopMessage(
            type=pb.StopMessage.CONNECT,
            peer=pb.PeerId(id=peer_to_bytes(PEER)),
            limit=pb.Limit(duration=120, data=1 << 17),
        ),
    ),
    (
        StopConnect(PEER),
        pb.StopMessage(
            type=pb.StopMessage.CONNECT, peer=pb.PeerId(id=peer_to_bytes(PEER))
        ),
    ),
    (
        StopStatus(Status.CONNECTION_FAILED),
        pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.Status.CONNECTION_FAILED),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), GOLDEN_HOP)
def test_hop_messages_are_py_libp2ps(ours, theirs):
    assert body_of(encode_hop(ours)) == theirs.SerializeToString()
    assert decode_hop_untrusted(theirs.SerializeToString()) == ours


@pytest.mark.parametrize(("ours", "theirs"), GOLDEN_STOP)
def test_stop_messages_are_py_libp2ps(ours, theirs):
    assert body_of(encode_stop(ours)) == theirs.SerializeToString()
    assert decode_stop_untrusted(theirs.SerializeToString()) == ours


def test_fields_that_we_do_not_use_are_ignored():
    theirs = pb.HopMessage(
        type=pb.HopMessage.RESERVE,
        peer=pb.PeerId(id=b"nonsense"),
        senderRecord=b"signed",
    )
    assert decode_hop_untrusted(theirs.SerializeToString()) == HopReserve()


def test_unknown_codes_and_addresses_are_no_error():
    theirs = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.Status.OK)
    theirs.reservation.expire = 5
    theirs.reservation.addrs.extend([b"\xff\xff", Multiaddr(ADDR).to_bytes()])
    decoded = decode_hop_untrusted(theirs.SerializeToString())
    assert decoded.reservation.addrs == (ADDR,)
    unknown = decode_hop_untrusted(encode_message([(1, 2), (5, 999)]))
    assert unknown.status == 999
    assert status_name(999) == "999"
    assert status_name(Status.OK) == "OK"


BAD_PEERS = [
    [],
    [(2, b"\xff")],
    [(2, encode_message([(1, b"\x00" * 65)]))],
    [(2, encode_message([(1, b"\x12\x20" + b"x" * 32)]))],
]
BAD = [
    b"",
    encode_message([(5, 100)]),
    encode_message([(1, 3)]),
    encode_message([(1, b"x")]),
    b"\x08\x00" + b"\x78\x00" * MAX_RELAY_MESSAGE_BYTES,
]


@pytest.mark.parametrize(
    "body", [*BAD, encode_message([(1, 2), (3, b"\x0a\xff")])], ids=range(6)
)
def test_malformed_messages_are_the_peers_fault(body):
    for decode in (decode_hop_untrusted, decode_stop_untrusted):
        with pytest.raises(RemoteProtocolError):
            decode(body)


@pytest.mark.parametrize("peer", BAD_PEERS, ids=range(4))
def test_a_connect_names_an_ed25519_peer(peer):
    with pytest.raises(RemoteProtocolError):
        decode_hop_untrusted(encode_message([(1, 1), *peer]))
    with pytest.raises(RemoteProtocolError):
        decode_stop_untrusted(encode_message([(1, 0), *peer]))


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_one_error(body):
    for decode in (decode_hop_untrusted, decode_stop_untrusted):
        with contextlib.suppress(RemoteProtocolError):
            decode(body)


def test_a_voucher_is_an_envelope_that_py_libp2p_verifies():
    sealed = seal_voucher(RELAY, PEER, 1_800_000_000)
    envelope = unmarshal_envelope(sealed)
    envelope.validate("libp2p-relay-rsvp")
    assert envelope.payload_type == VOUCHER.payload_type
    voucher = pb.Voucher.FromString(envelope.raw_payload)
    assert voucher.relay == peer_to_bytes(RELAY.peer_id)
    assert voucher.peer == peer_to_bytes(PEER)
    assert voucher.expiration == 1_800_000_000
