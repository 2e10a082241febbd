"""Entries: golden bytes, round trip, and the door."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_store.entry import MAX_ENTRY_BYTES, decode_entry_untrusted, sign_entry
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import MeshId
from fabric.core.signing import Ed25519Signer

SIGNER = Ed25519Signer(bytes(range(32)))
MESH = MeshId("11" * 32)
GOLDEN = (
    "2b12fa7c675735319be8eece48c49ffd3f0295beca10be2e3d48cebb7eec3234657ad0aa96d9ae7f"
    "e9a3166e104d46b5f09d5a82cb97bf6060ffcd0f9aad650096c42011111111111111111111111111"
    "11111111111111111111111111111111111111c42003a107bff3ce10be1d70dd18e74bc09967e4d6"
    "309ba50d5f1ddc8664125531b8a36d2f78cf0019f0a000000000ce00015180c40576616c7565"
)
GOLDEN_ID = "8c7116c7ae3693fd0f937c4764c95f6089a0205522ff49fddcc5f292ebfaa804"


def test_the_wire_format_does_not_change_by_accident() -> None:
    entry = sign_entry(SIGNER, MESH, "m/x", 111411200000 << 16, 86400, b"value")
    assert entry.raw.hex() == GOLDEN
    assert entry.id.hex() == GOLDEN_ID
    assert decode_entry_untrusted(bytes.fromhex(GOLDEN)) == entry
    assert entry.signature_matches()


@given(
    key=st.text(min_size=1, max_size=200).filter(lambda s: s.isprintable()),
    hlc=st.integers(0, 2**62 - 1),
    ttl=st.integers(0, 86400),
    value=st.binary(max_size=4096),
)
def test_what_is_signed_is_read_back(key, hlc, ttl, value) -> None:
    entry = sign_entry(SIGNER, MESH, key, hlc, ttl, value)
    assert len(entry.raw) <= MAX_ENTRY_BYTES
    again = decode_entry_untrusted(entry.raw)
    assert again == entry
    assert again.signature_matches()


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_or_unsigned(raw) -> None:
    try:
        entry = decode_entry_untrusted(raw)
    except RemoteProtocolError:
        return
    assert not entry.signature_matches()


@given(st.data())
def test_no_changed_entry_verifies(data) -> None:
    raw = bytearray(sign_entry(SIGNER, MESH, "j/a/spec", 7 << 16, 0, b"value").raw)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        entry = decode_entry_untrusted(bytes(raw))
    except RemoteProtocolError:
        return
    assert not entry.signature_matches()


@pytest.mark.parametrize(
    ("key", "ttl", "value"),
    [("", 0, b""), ("k" * 201, 0, b""), ("k", -1, b""), ("k", 0, bytes(4097))],
)
def test_our_own_entries_are_bounded(key, ttl, value) -> None:
    with pytest.raises(ValueError, match=r"key|value|ttl"):
        sign_entry(SIGNER, MESH, key, 1, ttl, value)
