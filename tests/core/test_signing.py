"""Signatures hold for one domain, one kind, one payload and one signer."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import IntegrityError
from fabric.core.signing import (
    DOMAIN_ENTRY,
    DOMAIN_EVIDENCE,
    Ed25519Signer,
    open_signed,
    seal,
    verify,
)

SIGNER = Ed25519Signer(bytes(range(32)))
OTHER = Ed25519Signer(bytes(32))


@given(st.binary(max_size=200))
def test_domains_do_not_mix(payload):
    signature = SIGNER.sign(DOMAIN_ENTRY, payload)
    assert verify(SIGNER.public_key, DOMAIN_ENTRY, payload, signature)
    assert not verify(SIGNER.public_key, DOMAIN_EVIDENCE, payload, signature)
    assert not verify(OTHER.public_key, DOMAIN_ENTRY, payload, signature)
    assert not verify(SIGNER.public_key, DOMAIN_ENTRY, payload + b"x", signature)


def test_malformed_key_or_signature_is_false():
    assert not verify(b"short", DOMAIN_ENTRY, b"", bytes(64))
    assert not verify(SIGNER.public_key, DOMAIN_ENTRY, b"", b"short")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "b"},
        {"payload": b"q"},
        {"signer": OTHER.peer_id},
        {"signature": bytes(64)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_envelope(change):
    envelope = seal(SIGNER, "a", b"p")
    assert open_signed(envelope, "a") == (SIGNER.peer_id, b"p")
    with pytest.raises(IntegrityError):
        open_signed(msgspec.structs.replace(envelope, **change), "a")
