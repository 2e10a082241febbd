"""Signed peer records: the bytes of others are read, and ours are read by others."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.envelope import consume_envelope
from libp2p.peer.envelope import seal_record as their_seal
from libp2p.peer.id import ID
from libp2p.peer.peer_record import PeerRecord as TheirRecord
from multiaddr import Multiaddr

from fabric.core.errors import FabricError, IntegrityError, RemoteProtocolError
from fabric.core.protobuf import encode_message
from fabric.core.signing import Ed25519Signer
from nat.discovery.rendezvous_records import (
    MAX_ADDRS,
    MAX_ENVELOPE_BYTES,
    open_record_untrusted,
    seal_record,
)

SIGNER = Ed25519Signer(b"1" * 32)
RELAY = Ed25519Signer(b"2" * 32).peer_id
ADDRS = (
    "/ip4/192.0.2.1/tcp/4801",
    "/ip6/2001:db8::1/tcp/4801",
    f"/ip4/192.0.2.9/tcp/4801/p2p/{RELAY}/p2p-circuit",
)


def test_ours_is_read_back_with_or_without_our_id_in_the_addresses():
    full = [f"{addr}/p2p/{SIGNER.peer_id}" for addr in ADDRS]
    for addrs in (ADDRS, full):
        record = open_record_untrusted(seal_record(SIGNER, addrs, 7))
        assert (record.peer, record.seq, record.addrs) == (SIGNER.peer_id, 7, ADDRS)


def test_py_libp2p_reads_ours():
    _, record = consume_envelope(seal_record(SIGNER, ADDRS, 7), "libp2p-peer-record")
    assert str(record.peer_id) == SIGNER.peer_id
    assert tuple(map(str, record.addrs)) == ADDRS


def test_we_read_py_libp2ps():
    pair = create_new_key_pair(b"3" * 32)
    peer = ID.from_pubkey(pair.public_key)
    theirs = TheirRecord(peer, [Multiaddr(addr) for addr in ADDRS], 9)
    record = open_record_untrusted(
        their_seal(theirs, pair.private_key).marshal_envelope()
    )
    assert (record.peer, record.seq, record.addrs) == (str(peer), 9, ADDRS)


def test_too_many_addresses_are_cut_and_names_left_out():
    many = [f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 40)]
    record = open_record_untrusted(seal_record(SIGNER, ["/what/x", *many], 1))
    assert record.addrs == tuple(many[:MAX_ADDRS])


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at, flip):
    sealed = bytearray(seal_record(SIGNER, ADDRS, 7))
    sealed[at % len(sealed)] ^= flip
    try:
        record = open_record_untrusted(bytes(sealed))
    except (RemoteProtocolError, IntegrityError):
        return
    # fields that protobuf ignores may change; what is signed may not
    assert (record.peer, record.seq, record.addrs) == (SIGNER.peer_id, 7, ADDRS)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_record_or_an_error(data):
    with contextlib.suppress(RemoteProtocolError, IntegrityError):
        open_record_untrusted(data)


def resealed(payload, kind=b"\x03\x01", domain=b"\x12libp2p-peer-record"):
    body = bytes([len(kind)]) + kind + bytes([len(payload)]) + payload
    return encode_message(
        [
            (1, b"\x08\x01\x12\x20" + SIGNER.public_key),
            (2, kind),
            (3, payload),
            (5, SIGNER.sign(domain, body)),
        ]
    )


@pytest.mark.parametrize(
    "sealed",
    [
        resealed(b""),
        resealed(encode_message([(1, b"no id")])),
        resealed(encode_message([(1, b"\x00\x24\x08\x01\x12\x20" + b"x" * 32)])),
        resealed(b"", kind=b"\x03\x02"),
        resealed(b"", domain=b"fabric/entry/1\0"),
        resealed(b"\xff\xff"),
        bytes(MAX_ENVELOPE_BYTES + 1),
    ],
    ids=["empty", "no_id", "another", "type", "domain", "garbage", "long"],
)
def test_a_signature_alone_is_not_enough(sealed):
    with pytest.raises(FabricError):
        open_record_untrusted(sealed)
