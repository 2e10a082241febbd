"""Settings of TCP hole punching, on both planes."""

from __future__ import annotations

import msgspec


class PunchConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How long and how hard to punch, and how much of it peers may ask of us."""

    punch_seconds: float = 3.0
    """Longest time in which one punch dials (both sides, from the SYNC on)."""
    observe_seconds: float = 1.5
    """Longest time to learn the mapping of a fresh port from observers."""
    exchange_seconds: float = 5.0
    """Longest time for CONNECT and SYNC on the control stream, observing included."""
    prove_seconds: float = 2.0
    """A connected socket must show its nonce within this."""
    max_jitter_seconds: float = 0.02
    """Between two SYNs to one address at most, outside of bursts."""
    max_tries: int = 3000
    """SYNs to one address in one punch; bounds what a forged CONNECT costs a victim."""
    max_accepted: int = 16
    """Unproven inbound connections of one punch."""
    max_outbound_per_peer: int = 3
    """Punches of ours with one peer at once; more wait their turn."""
    max_inbound: int = 16
    """Punches that peers asked for, at once."""
    max_inbound_per_peer: int = 4
    """The same, for one peer: its RPC, two spares, one more."""
    inbound_burst: int = 12
    """Punches one peer may ask for in a row."""
    inbound_interval_seconds: float = 2.0
    """After the burst one more each; ten times as many from all peers together."""
    max_accepted_sockets_per_peer: int = 64
    """Punched sockets of one peer handed to the data plane and still open."""
    retry_seconds: tuple[float, ...] = (3.0, 6.0, 12.0, 30.0, 300.0)
    """Wait after the first, second and every further failure that may pass. The first
    come soon: while everybody joins, a NAT that counts its ports up gives the foretold
    one to somebody else, and a moment later it does not."""
    bulk_sockets: int = 2
    """Spare punched sockets kept ready for each peer in use; 0 keeps none."""
    max_spares: int = 32
    """Spare sockets in all."""
    spare_idle_seconds: float = 60.0
    """A spare that nobody took is closed after this."""
    max_dcutr: int = 4
    """Upgrades of relayed control connections at once; more wait their turn."""
    dcutr_attempts: int = 3
    """CONNECT and SYNC rounds of one upgrade (DCUtR, step 6)."""
    refused_seconds: tuple[float, ...] = (
        *(0.05, 0.1, 0.1, 0.2, 0.2, 0.4, 0.8, 1.6),
        *(5.0, 30.0, 300.0),
    )
    """Wait after the first, second and further time that a peer refuses an upgrade: it
    admits us a moment after we connect, and nothing tells when; or it has no DCUtR."""
    relay_grace_seconds: float = 10.0
    """The relayed connection stays this long after an upgrade, for what uses it."""
