"""PeerIds hold their key and refuse everything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import peer_id_of, public_key_of, short
from fabric.core.signing import Ed25519Signer

keys = st.binary(min_size=32, max_size=32)


@given(keys)
def test_round_trip(key):
    peer = peer_id_of(key)
    assert peer.startswith("12D3KooW")
    assert public_key_of(peer) == key
    assert peer.endswith(short(peer))


@given(st.text(max_size=80))
def test_anything_else_is_a_protocol_error(text):
    try:
        key = public_key_of(text)
    except RemoteProtocolError:
        return
    assert peer_id_of(key) == text


def test_key_of_wrong_length():
    with pytest.raises(ValueError, match="31 B"):
        peer_id_of(bytes(31))


def test_known_vector():
    # what libp2p names the key of 32 zero bytes
    assert Ed25519Signer(bytes(32)).peer_id == (
        "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    )
