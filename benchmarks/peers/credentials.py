"""Credentials on a contestant's standard input."""

from __future__ import annotations

from benchmarks.peers.child import Message
from fabric.bulk.certificates import Credentials


def from_message(message: Message) -> tuple[Credentials, bytes]:
    """Return (ours, the peer's certificate)."""
    ours = Credentials(
        bytes.fromhex(message["der"]),
        message["certificate"].encode(),
        message["key"].encode(),
    )
    return ours, bytes.fromhex(message["peer"])
