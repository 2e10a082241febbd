"""Who decides about offers and takes their connections; RPC's acceptor is here.

Inbound RPC speaks TLS in this process, under identity certificates.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from fabric.bulk.certificates import Credentials, check_identity_certificate_untrusted
from fabric.bulk.tls import make_context
from fabric.core.errors import LocalProtocolError, PeerTimeout
from fabric.core.ids import PeerId
from fabric.net.offers import Offer, OfferRequest
from fabric.net.ports import PathKind
from fabric.net.tls_stream import secure

AcceptRpc = Callable[[PeerId, trio.abc.Stream, PathKind], Awaitable[None]]
"""Owns an inbound RPC stream; the kind says what carries it."""


class Acceptor(Protocol):
    """Decides about offers of one purpose, and takes their connections."""

    def admit_untrusted(
        self, peer: PeerId, request: OfferRequest, now: float
    ) -> tuple[bytes, Credentials | None]:
        """Return the certificate to show, and its key if this process holds it.

        Args:
            peer: Authenticated by the control stream, allowed by the gate.
            request: Its purpose is this acceptor's.
            now: Unix seconds, for the certificate.

        Raises:
            FabricError: refused; the dialler learns code, reason and next step.
        """
        ...

    async def take(self, offer: Offer, sock: socket.socket, kind: PathKind) -> None:
        """Own ``sock``, blocking and before TLS; may last as long as the connection.

        Raises:
            FabricError: the connection came to nothing; ``sock`` is closed.
        """
        ...


class RpcAcceptor:
    """Decides about offers for RPC, and authenticates their connections.

    Args:
        identity: Returns our identity certificate and its key.
        accept: Takes over the authenticated stream.
        handshake_seconds: Longest TLS handshake.
    """

    def __init__(
        self,
        identity: Callable[[], Credentials],
        accept: AcceptRpc,
        handshake_seconds: float,
    ) -> None:
        self._identity = identity
        self._accept = accept
        self._handshake_seconds = handshake_seconds

    def admit_untrusted(
        self, peer: PeerId, request: OfferRequest, now: float
    ) -> tuple[bytes, Credentials | None]:
        """Return our identity certificate if the peer's is its own."""
        check_identity_certificate_untrusted(request.certificate, peer, now)
        ours = self._identity()
        return ours.der, ours

    async def take(self, offer: Offer, sock: socket.socket, kind: PathKind) -> None:
        """Authenticate, then hand the stream to the RPC service."""
        if offer.ours is None:
            raise LocalProtocolError("RPC offer without credentials")
        context = make_context(offer.ours, offer.peer_certificate, server=True)
        with trio.move_on_after(self._handshake_seconds) as scope:
            stream = await secure(sock, context, offer.peer_certificate, server=True)
        if scope.cancelled_caught:
            raise PeerTimeout(f"TLS handshake of {offer.peer} took too long")
        await self._accept(offer.peer, stream, kind)
