"""What the muxer needs of a security session, whichever protocol made it.

The muxer reads whatever has arrived (``read_message``) and writes whole batches; the
multistream negotiation before it wants ``read(n)`` to be exact. Both are here once, so
that Noise and TLS differ only in how they turn socket bytes into plaintext.
"""

from __future__ import annotations

from abc import abstractmethod

from libp2p.security.secure_session import SecureSession

from fabric.net.libp2p_guard import check_read

READ_BYTES = 256 * 1024
"""One socket read: four full Noise messages, sixteen full TLS records."""


class FabricSession(SecureSession):
    """An authenticated, encrypted connection after the handshake."""

    _plain = b""
    """Plaintext that a read with a size left over."""

    @property
    @abstractmethod
    def channel_binding(self) -> bytes:
        """32 bytes that the two ends of this connection, and no other, share."""

    @abstractmethod
    async def read_message(self) -> bytes:
        """Return plaintext that has arrived, waiting for some; b"" at the end.

        Raises:
            IOException: the connection broke, or what arrived was forged.
        """

    def _leftover(self) -> bytes:
        plain, self._plain = self._plain, b""
        return plain

    async def read(self, n: int | None = None) -> bytes:
        """Return exactly ``n`` bytes, fewer at the end; without ``n`` what arrived."""
        if n is None:
            return await self.read_message()
        check_read(n)
        parts = bytearray()
        while len(parts) < n:
            message = await self.read_message()
            if not message:
                break
            need = n - len(parts)
            parts += message[:need]
            self._plain = message[need:]
        return bytes(parts)
