"""Identity and job certificates: what is accepted, and every way not to be."""

import time

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.bulk import certificates as c
from fabric.core.errors import FabricError, IntegrityError, RemoteProtocolError
from fabric.core.signing import DOMAIN_JOB_CERTIFICATE, DOMAIN_TLS, Ed25519Signer

NOW = float(int(time.time()))
ALICE = Ed25519Signer(b"a" * 32)
BOB = Ed25519Signer(b"b" * 32)
IDENTITY = c.issue_identity_certificate(ALICE, NOW)
KEY_PEM, SPKI = c.make_worker_key()
JOB = "j" * 64


def statement(**changes):
    fields = {
        "job": JOB,
        "counter": 3,
        "spki": SPKI,
        "issued": int(NOW),
        "expires": int(NOW) + 3600,
    }
    return c.JobStatement(**(fields | changes))


def forged(signer, claim, *, domain=DOMAIN_JOB_CERTIFICATE):
    """A job certificate that skips the issuer's own checks."""
    payload = c._STATEMENT.encode(claim)
    signed = c._SignedStatement(payload, signer.sign(domain, payload))
    return c.job_credentials(KEY_PEM, c._SIGNED.encode(signed)).der


WORKER = c.job_credentials(KEY_PEM, c.issue_job_certificate(ALICE, statement(), NOW))


def test_identity_certificate_is_accepted_for_its_peer_only():
    c.check_identity_certificate_untrusted(IDENTITY.der, ALICE.peer_id, NOW)
    with pytest.raises(IntegrityError, match="another identity"):
        c.check_identity_certificate_untrusted(IDENTITY.der, BOB.peer_id, NOW)


def test_identity_certificate_ends():
    late = NOW + c.IDENTITY_LIFE_SECONDS + 1
    with pytest.raises(IntegrityError, match="expired"):
        c.check_identity_certificate_untrusted(IDENTITY.der, ALICE.peer_id, late)
    with pytest.raises(IntegrityError, match="not yet"):
        c.check_identity_certificate_untrusted(
            IDENTITY.der, ALICE.peer_id, NOW - 2 * c.CLOCK_SKEW_SECONDS
        )


def test_identity_certificate_with_a_wrong_signature_is_refused():
    class Liar(Ed25519Signer):
        def sign(self, domain, payload):
            return super().sign(domain, payload + b"!")

    liar = Liar(b"a" * 32)
    der = c.issue_identity_certificate(liar, NOW).der
    with pytest.raises(IntegrityError, match="not signed by"):
        c.check_identity_certificate_untrusted(der, ALICE.peer_id, NOW)


@pytest.mark.slow  # imports py-libp2p
def test_pylibp2p_accepts_an_identity_and_refuses_a_job_certificate():
    from libp2p.peer.id import ID
    from libp2p.security.tls.certificate import verify_certificate_chain
    from libp2p.security.tls.exceptions import MissingLibp2pExtensionError

    public = verify_certificate_chain([x509.load_der_x509_certificate(IDENTITY.der)])
    assert str(ID.from_pubkey(public)) == ALICE.peer_id
    with pytest.raises(MissingLibp2pExtensionError):
        verify_certificate_chain([x509.load_der_x509_certificate(WORKER.der)])


@pytest.mark.slow
def test_we_accept_what_pylibp2p_issues():
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.security.tls.certificate import (
        create_cert_template,
        generate_certificate,
    )

    pair = create_new_key_pair(seed=ALICE.seed)
    pem, _ = generate_certificate(pair.private_key, create_cert_template())
    certificate = x509.load_pem_x509_certificate(pem.encode())
    der = certificate.public_bytes(c.Encoding.DER)
    c.check_identity_certificate_untrusted(der, ALICE.peer_id, NOW)


def test_job_certificate_states_its_job_counter_and_key():
    found = c.check_job_certificate_untrusted(WORKER.der, ALICE.peer_id, JOB, NOW)
    assert found == statement()


@pytest.mark.parametrize(
    ("claim", "when", "error"),
    [
        (statement(job="k" * 64), NOW, "another job"),
        (statement(spki=SPKI[:-1] + b"\0"), NOW, "another key"),
        (statement(expires=int(NOW) + 3601), NOW, "above an hour"),
        (statement(expires=int(NOW) + 60), NOW + 61, "expired"),
        (
            statement(issued=int(NOW) + 10_000, expires=int(NOW) + 10_100),
            NOW,
            "not yet",
        ),
    ],
    ids=["job", "key", "hour", "expired", "early"],
)
def test_job_certificate_of_another_job_key_or_time_is_refused(claim, when, error):
    der = forged(ALICE, claim)
    with pytest.raises(IntegrityError, match=error):
        c.check_job_certificate_untrusted(der, ALICE.peer_id, JOB, when)


def test_job_certificate_of_another_peer_or_domain_is_refused():
    with pytest.raises(IntegrityError, match="not signed"):
        c.check_job_certificate_untrusted(WORKER.der, BOB.peer_id, JOB, NOW)
    der = forged(ALICE, statement(), domain=DOMAIN_TLS)
    with pytest.raises(IntegrityError, match="not signed"):
        c.check_job_certificate_untrusted(der, ALICE.peer_id, JOB, NOW)


def test_the_two_kinds_do_not_pass_for_each_other():
    with pytest.raises(RemoteProtocolError, match="lacks extension"):
        c.check_identity_certificate_untrusted(WORKER.der, ALICE.peer_id, NOW)
    with pytest.raises(RemoteProtocolError, match="lacks extension"):
        c.check_job_certificate_untrusted(IDENTITY.der, ALICE.peer_id, JOB, NOW)


@pytest.mark.parametrize("life", [0, -5, 3601])
def test_issuer_refuses_an_impossible_lifetime(life):
    claim = statement(expires=int(NOW) + life)
    with pytest.raises(ValueError, match="job certificate"):
        c.issue_job_certificate(ALICE, claim, NOW)


def test_a_worker_cannot_self_sign_with_a_key_that_was_not_stated():
    other_pem, _ = c.make_worker_key()
    stolen = c.job_credentials(
        other_pem, c.issue_job_certificate(ALICE, statement(), NOW)
    )
    with pytest.raises(IntegrityError, match="another key"):
        c.check_job_certificate_untrusted(stolen.der, ALICE.peer_id, JOB, NOW)


def test_private_keys_do_not_show_in_logs():
    assert "PRIVATE" not in repr(IDENTITY)


def _door(der):
    for check in (
        lambda: c.check_identity_certificate_untrusted(der, ALICE.peer_id, NOW),
        lambda: c.check_job_certificate_untrusted(der, ALICE.peer_id, JOB, NOW),
    ):
        try:
            check()
        except FabricError as exc:
            assert isinstance(exc, IntegrityError | RemoteProtocolError)  # noqa: PT017


@given(st.binary(max_size=600))
@settings(max_examples=40, deadline=None)
def test_door_any_bytes(data):
    _door(data)


@given(
    der=st.sampled_from([IDENTITY.der, WORKER.der]),
    at=st.integers(0, 700),
    flip=st.integers(1, 255),
    cut=st.integers(0, 700),
)
@settings(max_examples=150, deadline=None)
def test_door_damaged_certificates(der, at, flip, cut):
    damaged = bytearray(der)
    damaged[at % len(der)] ^= flip
    _door(bytes(damaged))
    with pytest.raises((IntegrityError, RemoteProtocolError)):
        c.check_identity_certificate_untrusted(bytes(damaged), ALICE.peer_id, NOW)
    _door(der[:cut])


def test_oversized_certificate_is_refused_before_it_is_parsed():
    with pytest.raises(RemoteProtocolError, match="4097 B"):
        c.check_identity_certificate_untrusted(b"0" * 4097, ALICE.peer_id, NOW)
