"""The trio twin of ``fabric.bulk.tls.handshake``: an authenticated TLS stream."""

from __future__ import annotations

import socket
import ssl

import trio

from fabric.bulk.tls import ACCEPTED, check_session
from fabric.core.errors import (
    FabricError,
    IntegrityError,
    RemoteProtocolError,
    Unavailable,
)


async def secure(
    sock: socket.socket, context: ssl.SSLContext, peer_der: bytes, *, server: bool
) -> trio.abc.Stream:
    """Return ``sock`` as an authenticated TLS stream; takes ownership of it.

    Bound it with ``trio.fail_after`` at the call site. On cancellation and on errors
    the socket is closed.

    Args:
        sock: Connected.
        context: Made by ``tls.make_context`` for this peer.
        peer_der: The offered certificate.
        server: Whether we accepted the connection.

    Raises:
        IntegrityError: the peer does not hold the offered certificate.
        RemoteProtocolError: the peer does not speak our TLS, or refused us.
        Unavailable: the connection broke.
    """
    sock.setblocking(False)
    raw = trio.SocketStream(trio.socket.from_stdlib_socket(sock))  # sets TCP_NODELAY
    stream = trio.SSLStream(raw, context, server_side=server)
    try:
        await stream.do_handshake()
        check_session(
            stream.getpeercert(binary_form=True),
            stream.selected_alpn_protocol(),
            peer_der,
        )
        if server:
            await stream.send_all(ACCEPTED)
        elif await stream.receive_some(1) != ACCEPTED:
            raise Unavailable("peer closed the connection during authentication")
    except trio.BrokenResourceError as exc:
        await trio.aclose_forcefully(raw)
        raise _tls_error(exc) from exc
    except BaseException:
        await trio.aclose_forcefully(raw)
        raise
    return stream


def _tls_error(error: trio.BrokenResourceError) -> FabricError:
    match error.__cause__:
        case ssl.SSLCertVerificationError() as cause:
            return IntegrityError(
                f"TLS peer did not show the offered certificate: {cause.verify_message}"
            )
        case ssl.SSLEOFError():
            return Unavailable("peer closed the TLS connection")
        case ssl.SSLError() as cause:
            return RemoteProtocolError(f"TLS failed: {cause.reason}")
        case cause:
            return Unavailable(f"connection broke: {cause}")
