"""Names and bounds that the real network and the one in memory share."""

from __future__ import annotations

GOSSIP_PROTOCOL = "/fabric/gossip/1"
"""What a neighbour must be admitted to before its gossip counts."""
MAX_GOSSIP_BYTES = 64 * 1024
"""Largest gossip payload."""
KAD_PROTOCOL = "/fabric/kad/1.0.0"
"""What a peer must be admitted to before it may store or ask for provider records."""
