"""What carrying a payload costs on the wire, beside the payload.

Counted as the socket's own counters do: what TCP delivers, without TCP's and IP's
headers and without acknowledgements.
"""

from __future__ import annotations

TLS_RECORD_BYTES = 22
"""Header 5, authentication tag 16, content type 1 (RFC 8446, 5.2)."""
_RPC_HEADER_BYTES = 9
_RPC_REQUEST_BYTES = 5
_RESPONSE_BYTES = TLS_RECORD_BYTES + _RPC_HEADER_BYTES
_MAX_RECORD = 1 << 14

GOSSIP_BYTES = 487
"""Envelope of a gossip message, as counted at the sockets of seven daemons.

Origin 40, number 10, topic 79, signature 66, key 38, headers 8; the signed record of
the sender, which py-libp2p attaches to every RPC, about 204 with the addresses of one
machine; and length prefix, yamux and the encrypted channel 42.
"""


def call_bytes(payload: int, method: str) -> int:
    """Return what a call of ``method`` with ``payload`` bytes costs."""
    return _RPC_REQUEST_BYTES + len(method) + response_bytes(payload)


def response_bytes(payload: int) -> int:
    """Return what the response to a call costs."""
    return payload + _RESPONSE_BYTES + payload // _MAX_RECORD * TLS_RECORD_BYTES
