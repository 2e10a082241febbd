"""What py-libp2p and the libraries below it raise about a peer or a connection."""

from __future__ import annotations

from contextlib import AbstractContextManager

from cryptography.exceptions import InvalidSignature, InvalidTag
from google.protobuf.message import DecodeError
from libp2p.exceptions import BaseLibp2pError
from multiaddr.exceptions import Error as MultiaddrError

from fabric.net.failures import BROKEN, network_errors

LIBP2P_BROKEN: tuple[type[Exception], ...] = (
    *BROKEN,
    BaseLibp2pError,
    MultiaddrError,
    DecodeError,  # a peer's protobuf
    InvalidTag,  # its ciphertext
    InvalidSignature,
    ValueError,  # its text (UnicodeDecodeError), key or address
)
"""Nothing else leaves the library because of what a peer or the network does."""


def libp2p_errors(what: str) -> AbstractContextManager[None]:
    """See :func:`fabric.net.failures.network_errors`."""
    return network_errors(what, LIBP2P_BROKEN)
