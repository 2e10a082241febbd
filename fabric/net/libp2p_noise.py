"""Noise for py-libp2p, with what it leaves out: the handshake hash and buffered reads.

The handshake is py-libp2p's own. Afterwards :class:`NoiseSession` reads the socket in
large pieces (py-libp2p: two small reads per message) and keeps the *handshake hash*,
which binds higher-level evidence to this very connection (Noise, section 11.2).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from google.protobuf.message import DecodeError
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_static_key_pair
from libp2p.io.exceptions import (
    ConnectionClosedError,
    DecryptionFailedException,
    IOException,
)
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import NoiseFailure
from libp2p.security.noise.patterns import PatternXX
from libp2p.security.noise.transport import Transport
from libp2p.security.secure_session import SecureSession
from noise.connection import NoiseConnection
from noise.exceptions import NoiseInvalidMessage
from typing_extensions import override

from fabric.net.libp2p_session import READ_BYTES, FabricSession

MAX_PLAINTEXT_BYTES = 65535 - 16
"""A Noise message without its authentication tag."""

_FAILED = (IOException, NoiseInvalidMessage, InvalidTag, DecodeError, ValueError)
"""What a handshake raises when the other end goes away or is no Noise peer."""


class _BoundPattern(PatternXX):
    """The XX handshake, keeping its state for the handshake hash."""

    def create_noise_state(self, prologue: bytes | None = None) -> NoiseConnection:
        self.state = super().create_noise_state(prologue)
        return self.state


class NoiseSession(FabricSession):
    """An authenticated, encrypted connection after the handshake."""

    def __init__(
        self, session: SecureSession, connection: IRawConnection, state: NoiseConnection
    ) -> None:
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            remote_permanent_pubkey=session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
            conn=session.conn,
        )
        self._connection = connection
        self._state = state
        self._cipher = b""
        self._offset = 0

    @property
    @override
    def channel_binding(self) -> bytes:
        """32 bytes that the two ends of this connection, and no other, share."""
        return bytes(self._state.get_handshake_hash())

    @override
    async def read_message(self) -> bytes:
        """Return the next plaintext (at most 65,519 B), or b"" at the end.

        Raises:
            IOException: the connection broke, or a message was forged.
        """
        if self._plain:
            return self._leftover()
        while (message := self._next_cipher()) is None:
            data = await self._connection.read(READ_BYTES)
            if not data:
                if len(self._cipher) > self._offset:
                    raise ConnectionClosedError("closed inside a message")
                return b""
            self._cipher = self._cipher[self._offset :] + data
            self._offset = 0
        try:
            return bytes(self._state.decrypt(message))
        except NoiseInvalidMessage as exc:
            raise DecryptionFailedException("Noise message not authentic") from exc

    def _next_cipher(self) -> bytes | None:
        start = self._offset + 2
        if len(self._cipher) < start:
            return None
        end = start + int.from_bytes(self._cipher[self._offset : start], "big")
        if len(self._cipher) < end:
            return None
        self._offset = end
        return self._cipher[start:end]

    async def write(self, data: bytes) -> None:
        """Encrypt and send ``data`` in as few messages as fit it, with one send."""
        parts: list[bytes] = []
        for start in range(0, len(data), MAX_PLAINTEXT_BYTES):
            cipher = self._state.encrypt(data[start : start + MAX_PLAINTEXT_BYTES])
            parts += (len(cipher).to_bytes(2, "big"), cipher)
        await self._connection.write(b"".join(parts))

    async def close(self) -> None:
        """Close the socket."""
        await self._connection.close()


class FabricNoise(Transport):
    """py-libp2p's Noise security transport, yielding :class:`NoiseSession`."""

    def __init__(self, key_pair: KeyPair) -> None:
        super().__init__(key_pair, create_static_key_pair().private_key)

    def get_pattern(self) -> _BoundPattern:
        """Return a fresh handshake."""
        return _BoundPattern(
            self.local_peer, self.libp2p_privkey, self.noise_privkey, None
        )

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Authenticate whoever connected."""
        pattern = self.get_pattern()
        try:
            session = await pattern.handshake_inbound(conn)
        except _FAILED as exc:
            raise NoiseFailure(f"handshake: {exc or type(exc).__name__}") from exc
        return NoiseSession(session, conn, pattern.state)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Authenticate ``peer_id``; another identity is an error."""
        pattern = self.get_pattern()
        try:
            session = await pattern.handshake_outbound(conn, peer_id)
        except _FAILED as exc:
            raise NoiseFailure(f"handshake: {exc or type(exc).__name__}") from exc
        return NoiseSession(session, conn, pattern.state)
