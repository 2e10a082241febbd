"""The trio twin of ``fabric.bulk.tls.handshake``: an authenticated TLS stream.

``trio.SSLStream`` decrypts one record (16 KiB) per call, with a lock and a checkpoint
each. An RPC connection has one reader and one writer, so :class:`TlsStream` needs no
locks, and decrypts at once all that has arrived.
"""

from __future__ import annotations

import socket
import ssl

import trio
from typing_extensions import override

from fabric.bulk.tls import ACCEPTED, check_session, tls_errors
from fabric.core.errors import Unavailable

_ARRIVAL_BYTES = 1 << 18
"""Received from the kernel at once."""
_RECORD_BYTES = 1 << 14
"""Plaintext of one TLS record (RFC 8446, section 5.1)."""


class TlsStream(trio.abc.Stream):
    """TLS over a TCP socket, for one reading and one writing task.

    Closing does not announce itself inside TLS: the frames above tell a whole message
    from a truncated one.

    Args:
        sock: Connected; owned.
        context: Made by ``tls.make_context`` for this peer.
        server: Whether we accepted the connection.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server: bool
    ) -> None:
        self._transport = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._arrived = bytearray(_ARRIVAL_BYTES)

    @property
    def certificate(self) -> bytes | None:
        """DER certificate the peer showed."""
        return self._tls.getpeercert(binary_form=True)

    @property
    def alpn(self) -> str | None:
        """Protocol that the handshake agreed on."""
        return self._tls.selected_alpn_protocol()

    def version(self) -> str | None:
        """Return the TLS version."""
        return self._tls.version()

    async def do_handshake(self) -> None:
        """Finish the handshake; raises what ``ssl`` raises."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._refill()
            except ssl.SSLError:
                await self._flush()  # the alert that tells the peer why
                raise
            else:
                await self._flush()
                return

    @override
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has arrived, at most ``max_bytes``; b"" at the end."""
        limit = _ARRIVAL_BYTES if max_bytes is None else max_bytes
        await trio.lowlevel.checkpoint_if_cancelled()
        while not (data := self._decrypt(limit)):
            if self._incoming.eof:
                return b""
            await self._refill()
        return data

    @override
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send ``data``; after cancellation the stream is unusable."""
        if data:
            try:
                self._tls.write(data)
            except ssl.SSLError as exc:
                raise trio.BrokenResourceError("TLS failed") from exc
        await self._flush()

    @override
    async def wait_send_all_might_not_block(self) -> None:
        await self._transport.wait_send_all_might_not_block()

    @override
    async def aclose(self) -> None:
        await self._transport.aclose()

    def _decrypt(self, limit: int) -> bytes:
        parts = []
        room = limit
        try:
            while room > 0:
                part = self._tls.read(min(room, _RECORD_BYTES))
                if not part:
                    break
                parts.append(part)
                room -= len(part)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError, ssl.SSLEOFError):
            pass  # all that arrived is decrypted, or the peer closed
        except ssl.SSLError as exc:
            raise trio.BrokenResourceError("TLS failed") from exc
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _refill(self) -> None:
        try:
            count = await self._transport.socket.recv_into(self._arrived)
        except OSError as exc:
            raise trio.BrokenResourceError("connection broke") from exc
        if count:
            with memoryview(self._arrived) as view:
                self._incoming.write(view[:count])
        else:
            self._incoming.write_eof()

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._transport.send_all(self._outgoing.read())
        else:
            await trio.lowlevel.checkpoint()


async def secure(
    sock: socket.socket, context: ssl.SSLContext, peer_der: bytes, *, server: bool
) -> TlsStream:
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
    stream = TlsStream(sock, context, server=server)
    try:
        with tls_errors():
            await stream.do_handshake()
        check_session(stream.certificate, stream.alpn, peer_der)
        if server:
            await stream.send_all(ACCEPTED)
        elif await stream.receive_some(1) != ACCEPTED:
            raise Unavailable("peer closed the connection during authentication")
    except trio.BrokenResourceError as exc:
        await trio.aclose_forcefully(stream)
        with tls_errors():
            raise exc.__cause__ or Unavailable("connection broke")  # noqa: B904
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream
