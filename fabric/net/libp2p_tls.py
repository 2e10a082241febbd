"""TLS 1.3 as libp2p speaks it (``/tls/1.0.0``), next to Noise on the control plane.

    offer order   Noise first: two of ours never get here; peers that have only TLS do.
    certificate   self-signed, P-256, the libp2p extension first, another key than the
                  identity.
    trust         none beforehand: the handshake proves the certificate's key, the
                  extension's signature proves whose key that is. Both sides show one.

The peer's certificate is not known before the handshake, so the standard library cannot
ask for it and judge it (CERT_REQUIRED wants an anchor, CERT_NONE asks for nothing).
OpenSSL's verify callback can: it is called with the certificate, before the handshake
completes, so an impostor gets an alert and never our answer.

Source: libp2p specs, tls/tls.md.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_der_x509_certificate
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from OpenSSL import SSL, crypto

from fabric.bulk.certificates import (
    IDENTITY_LIFE_SECONDS,
    certificate_identity_untrusted,
    issue_identity_certificate,
)
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.libp2p_tls_session import TlsSession, first_reason, take_output

TLS_PROTOCOL = TProtocol("/tls/1.0.0")
ALPN = b"libp2p"
"""The one name we offer and choose; names of muxers before it are passed over."""
MAX_HANDSHAKE_BYTES = 64 * 1024
"""A handshake of one certificate takes under 4 KiB; OpenSSL alone allows more."""
HANDSHAKE_READ_BYTES = 16 * 1024
RENEW_AFTER_SECONDS = IDENTITY_LIFE_SECONDS / 2
"""Age at which a certificate is replaced; handshakes that run keep theirs."""


class TlsFailure(HandshakeFailure):
    """The handshake failed; ``code`` is what it is counted under."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _Handshake:
    """What the verify callback knows and learns of one handshake."""

    def __init__(self, wanted: PeerId | None, now: float) -> None:
        self.wanted = wanted
        self.now = now
        self.peer: PeerId | None = None

    def check_untrusted(self, der: bytes) -> None:
        """Learn the peer from its certificate.

        Raises:
            RemoteProtocolError: it is no identity certificate.
            IntegrityError: it is expired, or a signature does not match.
            PeerIDMismatchesPubkey: it is another peer's than wanted.
        """
        peer = certificate_identity_untrusted(der, self.now)
        if self.wanted not in (None, peer):
            raise PeerIDMismatchesPubkey(f"it is {peer}, not {self.wanted}")
        self.peer = peer


class FabricTls(ISecureTransport):
    """libp2p TLS, yielding :class:`TlsSession`.

    Args:
        key_pair: The identity, for py-libp2p.
        signer: The identity, for certificates.
        clock: Unix seconds.
        counters: Where refused handshakes are counted, labelled by code.
    """

    def __init__(
        self,
        key_pair: KeyPair,
        signer: Ed25519Signer,
        clock: Callable[[], float],
        counters: Counters,
    ) -> None:
        self._key_pair = key_pair
        self._peer = ID.from_pubkey(key_pair.public_key)
        self._signer = signer
        self._clock = clock
        self._counters = counters
        self._context: SSL.Context | None = None
        self._issued = 0.0

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Authenticate whoever connected.

        Raises:
            HandshakeFailure: it did not prove an identity.
        """
        return await self._secure(conn, None)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Authenticate ``peer_id``; another identity is an error.

        Raises:
            HandshakeFailure: it did not prove that identity.
        """
        return await self._secure(conn, PeerId(str(peer_id)))

    async def _secure(self, conn: IRawConnection, wanted: PeerId | None) -> TlsSession:
        """Run the handshake and count its failure; a cancelled one is one, too."""
        code = "E_TLS_TIMEOUT"
        try:
            session = await self._handshake(conn, wanted)
            code = ""
        except TlsFailure as exc:
            code = exc.code
            raise
        except PeerIDMismatchesPubkey:
            code = "E_WRONG_PEER"
            raise
        finally:
            if code:
                self._counters.add(REFUSALS, label=code)
        return session

    async def _handshake(
        self, conn: IRawConnection, wanted: PeerId | None
    ) -> TlsSession:
        now = self._clock()
        tls = SSL.Connection(self._fresh_context(now), None)
        state = _Handshake(wanted, now)
        tls.set_app_data(state)
        if wanted is None:
            tls.set_accept_state()
        else:
            tls.set_connect_state()
        try:
            await _run_handshake(tls, conn)
        except FabricError as exc:
            raise TlsFailure("E_TLS_CERTIFICATE", exc.reason) from exc
        except SSL.Error as exc:
            raise _failure(exc) from exc
        except IOException as exc:
            raise TlsFailure("E_TLS_HANDSHAKE", str(exc) or "broken") from exc
        peer = _checked_peer(tls, state)
        return TlsSession(
            self._peer,
            self._key_pair,
            peer,
            conn,
            tls,
            is_initiator=wanted is not None,
        )

    def _fresh_context(self, now: float) -> SSL.Context:
        """Return a context whose certificate has half of its life left."""
        if self._context is None or not 0 <= now - self._issued < RENEW_AFTER_SECONDS:
            self._context = _context(self._signer, now)
            self._issued = now
        return self._context


async def _run_handshake(tls: SSL.Connection, conn: IRawConnection) -> None:
    """Exchange handshake messages until both sides are authenticated.

    Raises:
        FabricError: what the verify callback found wrong with the certificate.
        SSL.Error: OpenSSL's own findings.
        IOException: the connection broke.
    """
    room = MAX_HANDSHAKE_BYTES
    while True:
        try:
            tls.do_handshake()
        except SSL.WantReadError:
            await conn.write(take_output(tls))
        except BaseException:
            await conn.write(take_output(tls))  # the alert
            raise
        else:
            await conn.write(take_output(tls))
            return
        data = await conn.read(HANDSHAKE_READ_BYTES)
        room -= len(data)
        if not data or room < 0:
            raise IOException("closed" if not data else "handshake of too many bytes")
        tls.bio_write(data)


def _checked_peer(tls: SSL.Connection, state: _Handshake) -> PeerId:
    """Return who was authenticated.

    Raises:
        TlsFailure: nobody (a resumed session shows no certificate), more certificates
            than one, or no agreement on libp2p.
    """
    shown = tls.get_peer_cert_chain(as_cryptography=True) or []
    leaf = tls.get_peer_certificate(as_cryptography=True)
    if state.peer is None or leaf is None or any(other != leaf for other in shown):
        raise TlsFailure("E_TLS_CERTIFICATE", "not exactly one certificate")
    if tls.get_alpn_proto_negotiated() != ALPN:
        raise TlsFailure("E_TLS_ALPN", "the peer does not speak libp2p over TLS")
    return state.peer


def _failure(error: SSL.Error) -> TlsFailure:
    reason = first_reason(error)
    missing = "did not return a certificate" in reason
    return TlsFailure("E_TLS_NO_CERTIFICATE" if missing else "E_TLS_HANDSHAKE", reason)


def _context(signer: Ed25519Signer, now: float) -> SSL.Context:
    """Return settings for both roles under a fresh certificate of ``signer``."""
    credentials = issue_identity_certificate(signer, now)
    key = load_pem_private_key(credentials.key_pem, None)
    assert isinstance(key, EllipticCurvePrivateKey)
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.use_certificate(load_der_x509_certificate(credentials.der))
    context.use_privatekey(key)
    # a resumed session would skip the certificate
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _judge)
    context.set_alpn_protos([ALPN])
    context.set_alpn_select_callback(_choose)
    return context


def _judge(
    tls: SSL.Connection, certificate: crypto.X509, error: int, depth: int, ok: int
) -> bool:
    """Decide by the libp2p extension; OpenSSL's chain errors say nothing here."""
    if depth:
        return False  # the spec wants a chain of one
    state: _Handshake = tls.get_app_data()
    if state.peer is None:
        state.check_untrusted(
            crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)
        )
    return True


def _choose(tls: SSL.Connection, offered: list[bytes]) -> bytes:
    if ALPN not in offered:
        raise TlsFailure("E_TLS_ALPN", "the peer does not offer libp2p over TLS")
    return ALPN
