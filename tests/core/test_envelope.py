"""Signed envelopes: their bytes, and what damage and other signers give."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.envelope import EnvelopeKind, open_untrusted, seal
from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.protobuf import encode_message
from fabric.core.signing import Ed25519Signer
from nat.discovery.rendezvous_records import open_record_untrusted, seal_record
from nat.relay.voucher import seal_voucher

ONE, TWO = Ed25519Signer(b"a" * 32), Ed25519Signer(b"b" * 32)
KIND = EnvelopeKind(b"tests", b"\x07", 512)

VOUCHER = (
    "0a2408011220af06a3e3291714e4f356c19c9b15cd1951ec6e6662aa77be07547f289383341d"
    "120282061a560a26002408011220af06a3e3291714e4f356c19c9b15cd1951ec6e6662aa77be"
    "07547f289383341d12260024080112202df04125f0015afb47ce853aef8772094ff9498c14cb"
    "1b9e12973c2927da0fa61880a4a7da062a40e4df6f8aa638adcb23c955503a11998ae5fd207a"
    "f755473a9ce64b2f391d5ef72c859122094650c7d5e99017d306ccfa65d4d53e1651e9eb2e52"
    "4ae0860b9b03"
)
PEER_RECORD = (
    "0a2408011220af06a3e3291714e4f356c19c9b15cd1951ec6e6662aa77be07547f289383341d"
    "120203011a360a26002408011220af06a3e3291714e4f356c19c9b15cd1951ec6e6662aa77be"
    "07547f289383341d10071a0a0a0804c00002010612c12a407959c42e0afda181f2a977bc3121"
    "18710b8a80ce8348ed732a4a74b64cd1f62a69a2a1ae9f8fbc3beed14935d8cb60671a3f3368"
    "7accd841fda6fd577a97ae03"
)
"""Of version 0.1.0; go-libp2p, js-libp2p and py-libp2p agree on the form."""


def test_golden_envelopes():
    assert seal_voucher(ONE, TWO.peer_id, 1_800_000_000).hex() == VOUCHER
    sealed = seal_record(ONE, ["/ip4/192.0.2.1/tcp/4801"], 7)
    assert sealed.hex() == PEER_RECORD
    record = open_record_untrusted(sealed)
    assert (record.peer, record.seq) == (ONE.peer_id, 7)
    assert record.addrs == ("/ip4/192.0.2.1/tcp/4801",)


@given(st.binary(max_size=200))
def test_what_is_sealed_opens(payload):
    assert open_untrusted(KIND, seal(KIND, ONE, payload)) == (ONE.peer_id, payload)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_an_error_of_the_peer(at, change):
    sealed = bytearray(seal(KIND, ONE, b"payload"))
    sealed[at % len(sealed)] ^= change
    # protobuf has several forms of one message; none gives another content
    with contextlib.suppress(RemoteProtocolError, IntegrityError):
        assert open_untrusted(KIND, bytes(sealed)) == (ONE.peer_id, b"payload")


@given(st.binary(max_size=600))
def test_any_bytes_at_the_door(data):
    with pytest.raises((RemoteProtocolError, IntegrityError)):
        open_untrusted(KIND, data)


def test_an_envelope_of_another_kind_or_size_does_not_open():
    sealed = seal(KIND, ONE, b"payload")
    other_domain = EnvelopeKind(b"other", b"\x07", 512)
    with pytest.raises(IntegrityError):
        open_untrusted(other_domain, sealed)
    with pytest.raises(RemoteProtocolError, match="type 07"):
        open_untrusted(EnvelopeKind(b"tests", b"\x08", 512), sealed)
    with pytest.raises(RemoteProtocolError, match="512 B"):
        open_untrusted(KIND, seal(KIND, ONE, bytes(512)))
    with pytest.raises(RemoteProtocolError, match="not Ed25519"):
        open_untrusted(KIND, encode_message([(1, b"\x08\x00\x12\x20" + bytes(32))]))
