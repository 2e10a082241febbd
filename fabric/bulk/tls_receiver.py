"""The receiving end of a TLS connection that reads the socket in large pieces.

``ssl.SSLSocket`` asks the kernel twice per record, for its head and for its 16 KiB.
Here what has arrived is read at once and decrypted from memory: a quarter less
processor time at this end. What it sends is small, and encrypted into memory first.
"""

from __future__ import annotations

import socket
import ssl

from fabric.bulk.certificates import Credentials
from fabric.bulk.tls import ACCEPTED, check_session, make_context, tls_errors

READ_BYTES = 1 << 20
"""Read at once: what a sender's piece is."""


class TlsReceiver:
    """An authenticated connection of which we are the server; one thread at a time.

    Args:
        sock: Connected; owned, and closed when the handshake fails.
        credentials: Ours.
        peer_der: The certificate the peer offered, checked by the caller.
        timeout_seconds: Longest silence of the peer during the handshake.

    Raises:
        IntegrityError: the peer does not hold the offered certificate.
        RemoteProtocolError: the peer does not speak our TLS, or refused us.
        PeerTimeout: the peer was silent.
        Unavailable: the connection broke.
    """

    def __init__(
        self,
        sock: socket.socket,
        credentials: Credentials,
        peer_der: bytes,
        timeout_seconds: float,
    ) -> None:
        self._sock = sock
        self._raw = memoryview(bytearray(READ_BYTES))
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            sock.settimeout(timeout_seconds)
            if sock.family != socket.AF_UNIX:  # or answers wait for a delayed ACK
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            context = make_context(credentials, peer_der, server=True)
            self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=True)
            with tls_errors():
                self._handshake()
                check_session(
                    self._tls.getpeercert(binary_form=True),
                    self._tls.selected_alpn_protocol(),
                    peer_der,
                )
                self.send(ACCEPTED)
        except BaseException:
            sock.close()
            raise

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int = 0) -> int:
        """Receive up to ``nbytes`` (0: all that fits); 0 at the end of the stream."""
        size = nbytes or len(buffer)
        while True:
            try:
                return int(self._tls.read(size, buffer))  # with a buffer: a count
            except ssl.SSLWantReadError:
                self._refill()
            except ssl.SSLZeroReturnError:
                return 0

    def recv(self, nbytes: int) -> bytes:
        """Return up to ``nbytes``; nothing at the end of the stream."""
        buffer = bytearray(nbytes)
        return bytes(buffer[: self.recv_into(buffer)])

    def send(self, data: bytes | memoryview) -> int:
        """Send all of ``data``, which is small."""
        self._tls.write(data)
        self._flush()
        return len(data)

    def settimeout(self, value: float | None) -> None:
        """Bound each later call, in seconds."""
        self._sock.settimeout(value)

    def shutdown(self, how: int) -> None:
        """Shut the socket down; from any thread."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._refill()
            except ssl.SSLError:
                self._flush()  # the alert that says why
                raise
            else:
                self._flush()
                return

    def _refill(self) -> None:
        got = self._sock.recv_into(self._raw)
        if got:
            self._arrived.write(self._raw[:got])
        else:
            self._arrived.write_eof()

    def _flush(self) -> None:
        if self._leaving.pending:
            self._sock.sendall(self._leaving.read())
