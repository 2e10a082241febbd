"""A libp2p TLS connection after the handshake, as the muxer reads and writes it."""

from __future__ import annotations

import trio
from libp2p.abc import IRawConnection
from libp2p.crypto.ed25519 import Ed25519PublicKey
from libp2p.crypto.keys import KeyPair
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.peer.id import ID
from OpenSSL import SSL
from typing_extensions import override

from fabric.core.ids import PeerId, public_key_of
from fabric.net.libp2p_session import READ_BYTES, FabricSession

EXPORTER_LABEL = b"EXPORTER-Channel-Binding"
"""RFC 9266 section 2."""
BINDING_BYTES = 32
RECORD_BYTES = 16 * 1024
"""Plaintext of one TLS record (RFC 8446 section 5.1)."""
CLOSE_SECONDS = 0.5
"""Grace for close_notify."""


def take_output(tls: SSL.Connection) -> bytes:
    """Return what OpenSSL has ready for the peer, all of it."""
    parts: list[bytes] = []
    try:
        while True:
            parts.append(tls.bio_read(READ_BYTES))
    except SSL.WantReadError:  # the buffer is empty
        return b"".join(parts)


def first_reason(error: SSL.Error) -> str:
    """Return OpenSSL's first words about ``error``."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    reasons = [str(entry[-1]) for entry in queue if entry and entry[-1]]
    return reasons[0] if reasons else type(error).__name__


class TlsSession(FabricSession):
    """An authenticated, encrypted connection after the handshake."""

    def __init__(
        self,
        local: ID,
        key_pair: KeyPair,
        peer: PeerId,
        connection: IRawConnection,
        tls: SSL.Connection,
        *,
        is_initiator: bool,
    ) -> None:
        super().__init__(
            local_peer=local,
            local_private_key=key_pair.private_key,
            remote_peer=ID.from_base58(peer),
            remote_permanent_pubkey=Ed25519PublicKey.from_bytes(public_key_of(peer)),
            is_initiator=is_initiator,
            conn=connection,
        )
        self._connection = connection
        self._tls = tls
        self._binding = tls.export_keying_material(EXPORTER_LABEL, BINDING_BYTES, b"")
        # what is taken from OpenSSL's output is sent in that order
        self._sending = trio.Lock()

    @property
    @override
    def channel_binding(self) -> bytes:
        """32 bytes that the two ends of this connection, and no other, share."""
        return self._binding

    @override
    async def read_message(self) -> bytes:
        """Return all plaintext that has arrived, or b"" at the end.

        Answers to the peer's key updates leave with our next write, before its data
        (RFC 8446 section 4.6.3 wants no more), so a reader never waits for a writer.

        Raises:
            IOException: the connection broke, or a record was forged.
        """
        if self._plain:
            return self._leftover()
        while (plain := self._decrypt()) is None:
            data = await self._connection.read(READ_BYTES)
            if not data:
                return b""
            self._tls.bio_write(data)
        return plain

    def _decrypt(self) -> bytes | None:
        """Return the plaintext of the complete records, None if there is none yet."""
        parts: list[bytes] = []
        try:
            for _ in range(READ_BYTES // RECORD_BYTES):
                parts.append(self._tls.recv(RECORD_BYTES))
        except SSL.WantReadError:
            return b"".join(parts) or None
        except SSL.ZeroReturnError:
            return b"".join(parts)
        except SSL.Error as exc:
            if not parts:  # else the next read meets it again
                raise ConnectionClosedError(f"TLS: {first_reason(exc)}") from exc
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        """Encrypt and send ``data`` with one send."""
        async with self._sending:
            try:
                self._tls.sendall(data)
            except SSL.Error as exc:
                raise ConnectionClosedError(f"TLS: {first_reason(exc)}") from exc
            await self._connection.write(take_output(self._tls))

    async def close(self) -> None:
        """Say that we are done, if no writer is stuck, and close the socket."""
        with trio.move_on_after(CLOSE_SECONDS):
            try:
                self._sending.acquire_nowait()
                self._tls.shutdown()
                await self._connection.write(take_output(self._tls))
            except (trio.WouldBlock, SSL.Error, IOException):
                pass  # the peer may be gone already
        await self._connection.close()
