"""Settings of the data plane and of RPC."""

from __future__ import annotations

import msgspec

from fabric.net.budget_config import BudgetConfig


class RpcConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits and times of the RPC connections; every limit is per connection."""

    call_timeout_seconds: float = 10.0
    """Deadline of a call whose caller set none."""
    connect_timeout_seconds: float = 10.0
    """Longest time to open a connection, in which several callers may wait."""
    ping_interval_seconds: float = 1.0
    """A ping is sent this often; its answer measures the round-trip time."""
    dead_after_seconds: float = 5.0
    """A connection on which nothing arrived for this long is broken."""
    doubt_seconds: float = 2.0
    """A peer that is asked whether it is there, because something says that the path is
    dead, must answer within this, or within four round trips."""
    drain_seconds: float = 2.0
    """A superseded connection is closed after this long without a call."""
    max_queued_bytes: int = 32 << 20
    """Bytes waiting to be sent: eight of the largest messages, then calls fail."""
    max_in_flight: int = 4096
    """Calls of ours without an answer."""
    max_async_handlers: int = 256
    """Calls of the peer that run in tasks; more are refused with E_BUSY."""
    max_connections: int = 512
    """Peers connected at once; the only limit that is not per connection."""
    raise_bugs: bool = False
    """Let a handler's unexpected exception through: for tests."""


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the data plane listens and how much it takes on."""

    listen: str = ""
    """IP address and port; an unspecified address (0.0.0.0, [::]) listens on all of its
    kind. Several have commas between.

    Empty takes the addresses of the control plane and any port."""
    advertise: tuple[str, ...] = ()
    """Addresses ("ip:port") to offer instead of those found out."""
    share_port: bool = True
    """Take connections at the control plane's port too, for peers whose site lets out
    that port only (443), and where a router forwards a single one."""
    handshake_timeout_seconds: float = 10.0
    """Longest time from a TCP connection to an authenticated one."""
    offer_timeout_seconds: float = 10.0
    """Longest time for the exchange on the control stream."""
    label_life_seconds: float = 30.0
    """An offered label that was not used by then is void."""
    bulk_stall_seconds: float = 60.0
    """Longest time in which a bulk peer may move nothing."""
    max_offers: int = 512
    """Labels outstanding in all: each is about 1 KiB."""
    max_offers_per_peer: int = 32
    """Labels outstanding for one peer: its sockets to all our workers at once."""
    max_pending_connections: int = 128
    """Accepted TCP connections that have not authenticated yet."""
    max_bulk_connections: int = 64
    """Inbound bulk connections, each with a thread."""
    budget: BudgetConfig = BudgetConfig()
    rpc: RpcConfig = RpcConfig()
