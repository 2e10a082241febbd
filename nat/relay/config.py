"""Settings of relaying: for others (the relay) and of being relayed (the client)."""

from __future__ import annotations

from typing import Literal

import msgspec


class RelayConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What this peer gives as a relay.

    Members share the whole budget; strangers get enough of it to be admitted through
    this relay, and no more.
    """

    volunteer: Literal["auto", "always", "never"] = "auto"
    """"auto" relays while the world reaches us, and otherwise for members who find no
    relay and are connected with us; "never" does not even that."""
    reservation_seconds: float = 3600.0
    """Life of a reservation; the client renews it."""
    max_reservations: int = 128
    max_reservations_per_ip: int = 16
    """A household or an office; one more address costs an attacker more than that."""
    max_circuits: int = 256
    """In all. Each can hold twice the host's ``window_bytes`` in memory, if its ends
    mean to; an idle one holds some kilobytes."""
    max_circuits_per_peer: int = 96
    """With one peer at either end. One whose NAT nothing crosses has two with every
    other member, control and RPC, and four while both dial at once; half of them are
    at another relay."""
    circuit_seconds: int = 0
    """Longest life of a member's circuit; 0 is no limit."""
    circuit_bytes: int = 0
    """Most bytes of a member's circuit in each direction; 0 is no limit."""
    max_bytes_per_second: float = 32e6
    """All circuits together, both directions."""
    max_bytes_per_second_per_peer: float = 16e6
    """All circuits with one peer at either end, both directions."""
    max_bytes_per_second_per_circuit: float = 16e6
    """One circuit, both directions."""
    burst_seconds: float = 0.1
    """A circuit may be ahead of its rate by this much."""
    stranger_max_reservations: int = 16
    stranger_max_circuits: int = 8
    stranger_circuit_seconds: int = 120
    stranger_circuit_bytes: int = 2 << 20
    stranger_bytes_per_second: float = 1e6
    """All circuits with a stranger at an end, both directions."""
    idle_seconds: float = 300.0
    """A circuit that carries nothing for this long is closed."""
    request_seconds: float = 10.0
    """A request must have arrived within this."""
    connect_seconds: float = 10.0
    """The target of a circuit must have accepted within this."""
    max_pending: int = 64
    """Requests that are being read or connected, in all."""
    max_pending_per_peer: int = 8
    request_burst: int = 32
    """Requests of one peer in a row; it may ask twice a second afterwards."""
    requests_per_second: float = 2.0


class CircuitConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How this peer uses relays."""

    num_relays: int = 2
    """Relays at which a reservation is kept."""
    max_candidates: int = 16
    """Relays that are asked about, best first."""
    renew_fraction: float = 0.75
    """A reservation is renewed after this part of its life."""
    probe_seconds: float = 3.0
    """A candidate's round trip must take less than this."""
    reserve_seconds: float = 8.0
    """A relay must have answered a request for a reservation within this."""
    retry_seconds: tuple[float, ...] = (5.0, 30.0, 120.0, 600.0)
    """Pause of a relay that refused or failed once, twice, and so on."""
    connect_seconds: float = 8.0
    """One relay must have made a circuit within this; then the next is tried."""
    via_after_seconds: float = 1.5
    """Members that are no relays are asked this long after those that are."""
    hedge_seconds: float = 1.0
    """The next relay is tried beside one that has not answered for this long."""
    first_bytes_seconds: float = 10.0
    """An inbound circuit must say within this what it is for."""
    max_inbound: int = 64
    """Inbound circuits that have not said what they are for, and data circuits."""
    max_inbound_per_peer: int = 16
    min_data_bytes: int = 16 << 20
    """A relay that allows a circuit less than this is for signalling only."""
    min_data_seconds: int = 600
    """And one that allows it less time."""
