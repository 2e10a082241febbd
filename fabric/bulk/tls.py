"""TLS 1.3 with both sides authenticated by the certificates of one offer.

Each connection has a context of its own whose only trust anchor is the certificate that
the other side sent over the authenticated control stream. OpenSSL then asks for that
certificate and proves its key; afterwards the bytes are compared once more. CERT_NONE
would request nothing and CERT_OPTIONAL fails on self-signed certificates.

In TLS 1.3 a client has finished before the server has looked at its certificate, so the
server sends one byte when it is satisfied: only a read tells the client.
"""

from __future__ import annotations

import hmac
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from fabric.bulk.certificates import Credentials
from fabric.core.errors import (
    IntegrityError,
    PeerTimeout,
    RemoteProtocolError,
    Unavailable,
)

ALPN = "fabric-data/1"
"""What is spoken inside: frames of ``channel.py`` or of the RPC connection."""
ACCEPTED = b"\x01"
"""The byte a server sends when it has checked the client's certificate."""
_PIPE_BYTES = 1 << 16


def make_context(
    credentials: Credentials, peer_der: bytes, *, server: bool
) -> ssl.SSLContext:
    """Return a context for one handshake with the holder of ``peer_der``.

    Raises:
        IntegrityError: ``peer_der`` is not a certificate.
        ValueError: our own certificate and key do not match.
    """
    kind = ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # there are no names: the key is the identity
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([ALPN])
    try:
        context.load_verify_locations(cadata=peer_der)  # bytes: DER, one anchor
    except (ssl.SSLError, ValueError) as exc:
        raise IntegrityError(f"offered certificate does not load: {exc}") from exc
    _load(context, credentials)
    if server:
        context.num_tickets = 0  # no resumption; unread tickets turn close into reset
    return context


def check_session(certificate: bytes | None, alpn: str | None, peer_der: bytes) -> None:
    """Check what a finished handshake negotiated.

    Raises:
        IntegrityError: the certificate is not byte for byte the offered one.
        RemoteProtocolError: the peer does not speak our protocol.
    """
    if not hmac.compare_digest(certificate or b"", peer_der):
        raise IntegrityError("TLS peer did not show the offered certificate")
    if alpn != ALPN:
        raise RemoteProtocolError(f"TLS peer chose ALPN {alpn!r}, not {ALPN!r}")


def handshake(
    sock: socket.socket,
    credentials: Credentials,
    peer_der: bytes,
    *,
    server: bool,
    timeout_seconds: float,
) -> ssl.SSLSocket:
    """Return ``sock`` as an authenticated, blocking TLS socket; takes ownership of it.

    One thread at a time may use the result.

    Args:
        sock: Connected; closed when the handshake fails.
        credentials: Ours.
        peer_der: The certificate the peer offered, checked by the caller.
        server: Whether we accepted the connection (the dialler is the client).
        timeout_seconds: Longest silence of the peer, in seconds.

    Raises:
        IntegrityError: the peer does not hold the offered certificate.
        RemoteProtocolError: the peer does not speak our TLS, or refused us.
        PeerTimeout: the peer was silent.
        Unavailable: the connection broke.
    """
    try:
        # Explicit, because a descriptor handed over by another process may be
        # O_NONBLOCK while a new socket object believes that it blocks.
        sock.settimeout(timeout_seconds)
        if sock.family != socket.AF_UNIX:  # or Finished waits 40 ms for a delayed ACK
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = make_context(credentials, peer_der, server=server)
        with tls_errors():
            tls = context.wrap_socket(
                sock, server_side=server, do_handshake_on_connect=False
            )
    except BaseException:
        sock.close()
        raise
    try:
        with tls_errors():
            tls.do_handshake()
            check_session(
                tls.getpeercert(binary_form=True),
                tls.selected_alpn_protocol(),
                peer_der,
            )
            if server:
                tls.sendall(ACCEPTED)
            elif tls.recv(1) != ACCEPTED:
                raise Unavailable("peer closed the connection during authentication")
        tls.settimeout(None)
    except BaseException:
        tls.close()
        raise
    return tls


@contextmanager
def tls_errors() -> Iterator[None]:
    """Turn what ``ssl`` and ``socket`` raise into our errors."""
    try:
        yield
    except ssl.SSLCertVerificationError as exc:
        raise IntegrityError(
            f"TLS peer did not show the offered certificate: {exc.verify_message}"
        ) from exc
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as exc:
        raise Unavailable("peer closed the TLS connection") from exc
    except ssl.SSLError as exc:
        raise RemoteProtocolError(f"TLS failed: {exc.reason or exc}") from exc
    except TimeoutError as exc:
        raise PeerTimeout("peer was silent during a TLS operation") from exc
    except OSError as exc:
        raise Unavailable(f"connection broke: {exc}") from exc


def _load(context: ssl.SSLContext, credentials: Credentials) -> None:
    # OpenSSL takes only paths here; a pipe has one and never touches a disk.
    with (
        _readable(credentials.certificate_pem) as certificate,
        _readable(credentials.key_pem) as key,
    ):
        try:
            context.load_cert_chain(certificate, key)
        except OSError as exc:
            raise ValueError("our certificate and key do not match") from exc


@contextmanager
def _readable(data: bytes) -> Iterator[str]:
    if len(data) > _PIPE_BYTES:
        raise ValueError(f"credentials of {len(data)} B do not fit a pipe")
    reader, writer = os.pipe()
    try:
        try:
            os.write(writer, data)
        finally:
            os.close(writer)
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)
