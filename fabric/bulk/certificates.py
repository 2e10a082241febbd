"""Certificates of the data plane: who may hold the TLS key at the other end.

    identity certificate   daemons. Self-signed P-256 with the libp2p-TLS extension:
                           the identity key signs the certificate's public key.
    job certificate        workers. Self-signed P-256 with an extension of our own: the
                           identity key signs (job, counter, worker key, expiry).

Both are self-signed on purpose: there is no authority. A certificate travels inside an
offer on the authenticated control stream, is checked here, and becomes the only trust
anchor of one handshake (``tls.py``). The two kinds carry different extensions and are
signed under different domain tags, so neither passes for the other.

Source: libp2p specs, tls/tls.md (SignedKey is a DER SEQUENCE of two OCTET STRINGs).
"""

from __future__ import annotations

import datetime
import secrets
import warnings
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, NameOID

from fabric.core.codec import Codec
from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.ids import PeerId, peer_id_of, public_key_of
from fabric.core.signing import DOMAIN_JOB_CERTIFICATE, DOMAIN_TLS, Signer, verify

LIBP2P_TLS_OID = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
"""libp2p Public Key Extension."""
JOB_CERTIFICATE_OID = x509.ObjectIdentifier(
    "2.25.296178863838587192738672139983266018462"
)
"""Ours, under the arc that needs no registration (ITU-T X.667): 2.25 and the version 5
UUID of "urn:peerfabric:job-certificate:1" as a number."""

IDENTITY_LIFE_SECONDS = 7 * 86400
"""A daemon makes a new certificate at each start and renews it before this."""
MAX_JOB_LIFE_SECONDS = 3600
"""A job certificate cannot be revoked, so it is short (DESIGN section 2)."""
CLOCK_SKEW_SECONDS = 600
"""Tolerated difference between two members' clocks."""
MAX_CERTIFICATE_BYTES = 4096
"""Largest certificate parsed; ours have about 500 B."""

_KNOWN_CRITICAL = frozenset(
    {LIBP2P_TLS_OID, ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE}
)
# SEQUENCE of 104 B { OCTET STRING of 36 B { protobuf Ed25519 key } ... }
_SIGNED_KEY_HEAD = bytes.fromhex("30680424") + bytes.fromhex("08011220")
_SIGNED_KEY_MIDDLE = bytes.fromhex("0440")
_SIGNED_KEY_BYTES = len(_SIGNED_KEY_HEAD) + 32 + len(_SIGNED_KEY_MIDDLE) + 64
# All that the X.509 parser raises on hostile bytes.
_PARSE_ERRORS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Credentials:
    """A certificate and the private key that proves it; held in memory only.

    Attributes:
        der: The certificate, for offers and comparison.
        certificate_pem: The same, for OpenSSL.
        key_pem: The private key, PKCS8.
    """

    der: bytes
    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)


class JobStatement(msgspec.Struct, frozen=True, array_like=True):
    """What an identity signs about one of its workers.

    Attributes:
        job: The job.
        counter: Generation counter (fencing epoch) the certificate was issued in.
        spki: The worker's public key, DER SubjectPublicKeyInfo.
        issued: Unix seconds.
        expires: Unix seconds, at most an hour after ``issued``.
    """

    job: Annotated[str, msgspec.Meta(max_length=64)]
    counter: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    spki: Annotated[bytes, msgspec.Meta(max_length=256)]
    issued: Annotated[int, msgspec.Meta(ge=0, lt=2**40)]
    expires: Annotated[int, msgspec.Meta(ge=0, lt=2**40)]


class _SignedStatement(msgspec.Struct, frozen=True, array_like=True):
    payload: Annotated[bytes, msgspec.Meta(max_length=1024)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


_STATEMENT: Codec[JobStatement] = Codec(JobStatement, max_bytes=1024)
_SIGNED: Codec[_SignedStatement] = Codec(_SignedStatement, max_bytes=2048)


def issue_identity_certificate(signer: Signer, now: float) -> Credentials:
    """Return fresh TLS credentials vouched for by ``signer``, valid for a week.

    Args:
        signer: The daemon's identity.
        now: Unix seconds.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    signature = signer.sign(DOMAIN_TLS, _spki(key.public_key()))
    value = _SIGNED_KEY_HEAD + signer.public_key + _SIGNED_KEY_MIDDLE + signature
    extension = x509.UnrecognizedExtension(LIBP2P_TLS_OID, value)
    return _self_sign(key, extension, now, now + IDENTITY_LIFE_SECONDS)


def check_identity_certificate_untrusted(
    der: bytes, peer_id: PeerId, now: float
) -> None:
    """Accept ``der`` as the identity certificate of ``peer_id``.

    Raises:
        RemoteProtocolError: it does not parse, or is no identity certificate.
        IntegrityError: it is expired, another peer's, or a signature does not match.
    """
    public_key_of(peer_id)
    if certificate_identity_untrusted(der, now) != peer_id:
        raise IntegrityError(f"certificate of another identity, wanted {peer_id}")


def certificate_identity_untrusted(der: bytes, now: float) -> PeerId:
    """Return whose identity certificate ``der`` is; whoever has its key is that peer.

    Raises:
        RemoteProtocolError: it does not parse, or is no identity certificate.
        IntegrityError: it is expired, or a signature does not match.
    """
    certificate = _parse_untrusted(der)
    spki = _check_untrusted(certificate, now)
    value = _extension_untrusted(certificate, LIBP2P_TLS_OID)
    key_end = len(_SIGNED_KEY_HEAD) + 32
    signature_start = key_end + len(_SIGNED_KEY_MIDDLE)
    if (
        len(value) != _SIGNED_KEY_BYTES
        or not value.startswith(_SIGNED_KEY_HEAD)
        or value[key_end:signature_start] != _SIGNED_KEY_MIDDLE
    ):
        raise RemoteProtocolError("certificate extension is no Ed25519 SignedKey")
    public_key = value[len(_SIGNED_KEY_HEAD) : key_end]
    peer_id = peer_id_of(public_key)
    if not verify(public_key, DOMAIN_TLS, spki, value[signature_start:]):
        raise IntegrityError(f"certificate is not signed by {peer_id}")
    return peer_id


def make_worker_key() -> tuple[bytes, bytes]:
    """Return a throw-away P-256 key as (PKCS8 PEM, DER SubjectPublicKeyInfo)."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _key_pem(key), _spki(key.public_key())


def issue_job_certificate(signer: Signer, statement: JobStatement, now: float) -> bytes:
    """Return ``statement`` signed by the identity, for :func:`job_credentials`.

    Called in the daemon with the public key that a worker sent.

    Raises:
        ValueError: the statement is expired or lasts above an hour.
    """
    if not _lifetime_allowed(statement, now):
        raise ValueError(f"job certificate of {statement.expires - now:.0f} s")
    payload = _STATEMENT.encode(statement)
    signature = signer.sign(DOMAIN_JOB_CERTIFICATE, payload)
    return _SIGNED.encode(_SignedStatement(payload, signature))


def job_credentials(key_pem: bytes, signed_statement: bytes) -> Credentials:
    """Return the worker's TLS credentials: its key under its daemon's statement.

    Called in the worker, whose private key never leaves it.

    Raises:
        RemoteProtocolError: ``signed_statement`` is malformed.
    """
    signed = _SIGNED.decode_untrusted(signed_statement)
    statement = _STATEMENT.decode_untrusted(signed.payload)
    key = load_pem_private_key(key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("worker key is not an EC key")  # noqa: TRY004 - a bad value
    extension = x509.UnrecognizedExtension(JOB_CERTIFICATE_OID, signed_statement)
    return _self_sign(key, extension, statement.issued, statement.expires)


def check_job_certificate_untrusted(
    der: bytes, peer_id: PeerId, job: str, now: float
) -> JobStatement:
    """Accept ``der`` as the certificate of ``peer_id``'s worker of ``job``.

    The caller compares the statement's ``counter`` with the generation it acts in.

    Raises:
        RemoteProtocolError: it does not parse, or is no job certificate.
        IntegrityError: it is expired, too long-lived, another job's, peer's or key's,
            or a signature does not match.
    """
    certificate = _parse_untrusted(der)
    spki = _check_untrusted(certificate, now)
    signed = _SIGNED.decode_untrusted(
        _extension_untrusted(certificate, JOB_CERTIFICATE_OID)
    )
    if not verify(
        public_key_of(peer_id), DOMAIN_JOB_CERTIFICATE, signed.payload, signed.signature
    ):
        raise IntegrityError(f"job certificate is not signed by {peer_id}")
    statement = _STATEMENT.decode_untrusted(signed.payload)
    if statement.job != job:
        raise IntegrityError(f"job certificate of another job, wanted {job}")
    if statement.spki != spki:
        raise IntegrityError("job certificate was issued for another key")
    if not _lifetime_allowed(statement, now):
        raise IntegrityError("job certificate is expired or lasts above an hour")
    return statement


def _lifetime_allowed(statement: JobStatement, now: float) -> bool:
    life = statement.expires - statement.issued
    return (
        0 < life <= MAX_JOB_LIFE_SECONDS
        and statement.issued <= now + CLOCK_SKEW_SECONDS
        and now < statement.expires
    )


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _self_sign(
    key: ec.EllipticCurvePrivateKey,
    extension: x509.UnrecognizedExtension,
    start: float,
    end: float,
) -> Credentials:
    # A unique name: OpenSSL takes any trusted namesake for a certificate's issuer.
    name = x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, secrets.token_hex(16))])
    certificate = (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .not_valid_before(_utc(start - CLOCK_SKEW_SECONDS))
        .not_valid_after(_utc(end))
        # First, and alone: js-libp2p reads extensions[0]. Not critical: OpenSSL would
        # refuse a critical extension that it does not know.
        .add_extension(extension, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Credentials(
        der=certificate.public_bytes(Encoding.DER),
        certificate_pem=certificate.public_bytes(Encoding.PEM),
        key_pem=_key_pem(key),
    )


def _utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def _parse_untrusted(der: bytes) -> x509.Certificate:
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise RemoteProtocolError(
            f"certificate of {len(der)} B > {MAX_CERTIFICATE_BYTES} B"
        )
    try:
        with warnings.catch_warnings():
            # it warns, on our log, of serial numbers that are refused below
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            certificate = x509.load_der_x509_certificate(der)
            serial = certificate.serial_number
    except _PARSE_ERRORS as exc:
        raise RemoteProtocolError(f"certificate does not parse: {exc}") from exc
    if serial <= 0:
        raise RemoteProtocolError("certificate serial number is not positive")
    return certificate


def _check_untrusted(certificate: x509.Certificate, now: float) -> bytes:
    """Check what both kinds share; return the certificate's SPKI."""
    try:
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise RemoteProtocolError("certificate key is not an EC key")
        certificate.verify_directly_issued_by(certificate)
        critical = {e.oid for e in certificate.extensions if e.critical}
        spki = _spki(key)
        start = certificate.not_valid_before_utc.timestamp()
        end = certificate.not_valid_after_utc.timestamp()
    except InvalidSignature as exc:
        raise IntegrityError("certificate's self-signature does not match") from exc
    except _PARSE_ERRORS as exc:
        raise RemoteProtocolError(f"certificate does not parse: {exc}") from exc
    if unknown := critical - _KNOWN_CRITICAL:
        names = ", ".join(oid.dotted_string for oid in unknown)
        raise RemoteProtocolError(f"unknown critical extension: {names}")
    if not start <= now <= end:
        raise IntegrityError("certificate is expired or not yet valid")
    return spki


def _extension_untrusted(
    certificate: x509.Certificate, oid: x509.ObjectIdentifier
) -> bytes:
    try:
        value = certificate.extensions.get_extension_for_oid(oid).value
    except x509.ExtensionNotFound as exc:
        raise RemoteProtocolError(
            f"certificate lacks extension {oid.dotted_string}"
        ) from exc
    if not isinstance(value, x509.UnrecognizedExtension):
        raise RemoteProtocolError("extension of an unexpected type")
    return value.value
