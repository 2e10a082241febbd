"""The exchange cores without streams: order, doors and bounds."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.admission import (
    JoinerExchange,
    Local,
    Side,
    Software,
    VerifierExchange,
    fit_authority,
)
from attestation.messages import (
    CODEC,
    MAX_AUTHORITY_BYTES,
    MAX_ENTRY_BYTES,
    MAX_MESSAGE_BYTES,
    Admitted,
)
from attestation.software import accepted
from fabric.core.errors import LocalProtocolError, RemoteProtocolError
from fabric.core.ids import MeshId
from fabric.core.signing import Ed25519Signer
from fabric.net.ports import ALLOWED

MESH = MeshId("ab" * 32)
A, B = Ed25519Signer(b"\1" * 32), Ed25519Signer(b"\2" * 32)


def sides():
    software = Software(b"\5" * 32, "0.1.0")
    a = Side(Local(A, MESH, software), B.peer_id, b"c" * 32, b"a" * 32)
    b = Side(Local(B, MESH, software), A.peer_id, b"c" * 32, b"b" * 32)
    return JoinerExchange(a), VerifierExchange(b)


def wire(message):
    return CODEC.encode(message)


def test_two_cores_back_to_back():
    joiner, verifier = sides()
    hello = verifier.receive_hello_untrusted(wire(joiner.hello([b"redemption"])))
    assert hello.credential == (b"redemption",)
    challenge = verifier.on_membership(ALLOWED)
    proof = joiner.receive_untrusted(wire(challenge))
    findings = verifier.receive_proof_untrusted(wire(proof))
    assert accepted(findings)
    admitted = verifier.conclude(findings, 1200.0, [b"grant"])
    received = joiner.receive_untrusted(wire(admitted))
    assert isinstance(received, Admitted)
    assert received.authority == (b"grant",)
    assert accepted(joiner.appraise(received))


def test_steps_out_of_order_are_our_bug():
    _, verifier = sides()
    with pytest.raises(LocalProtocolError):
        verifier.on_membership(ALLOWED)
    with pytest.raises(LocalProtocolError):
        verifier.conclude([], 1.0, [])


def test_authority_always_fits_one_message():
    entries = [b"x" * 4096] * 1000
    fitting = fit_authority(entries)
    assert 0 < len(fitting) < len(entries)
    assert sum(map(len, fitting)) <= MAX_AUTHORITY_BYTES
    tiny = fit_authority([b"y"] * 100_000)
    for some in (fitting, tiny):
        raw = wire(Admitted(1, 1.0, b"e" * 1024, some))
        assert len(raw) <= MAX_MESSAGE_BYTES
        assert CODEC.decode_untrusted(raw).authority == some
    assert fit_authority([b"z" * (MAX_ENTRY_BYTES + 1), b"ok"]) == (b"ok",)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_any_bytes_are_a_value_or_a_protocol_error(received):
    joiner, verifier = sides()
    for raw in received:
        with suppress(RemoteProtocolError):
            assert not isinstance(joiner.receive_untrusted(raw), Admitted)
    if received:
        with suppress(RemoteProtocolError):
            verifier.receive_hello_untrusted(received[0])
