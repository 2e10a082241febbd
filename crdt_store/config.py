"""What an operator may set about the replicated store."""

from __future__ import annotations

from typing import Annotated

import msgspec

from crdt_store.liveness.config import LivenessConfig

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]


class StoreConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Periods and bounds of the replicated store."""

    sync_period_seconds: Seconds = 5.0
    """Shortest time between two reconciliations that we start."""
    sync_seconds_per_member: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.03
    """The period grows with the mesh, so that idle traffic per peer stays flat."""
    sync_timeout_seconds: Seconds = 30.0
    """One whole reconciliation with one peer."""
    connect_poll_seconds: Seconds = 1.0
    """How soon a fresh connection is noticed and reconciled; also the expiry period."""
    push_batch_seconds: Seconds = 0.05
    """Entries written within this time leave in one gossip message."""
    push_interval_seconds: Seconds = 0.2
    """At most 5 messages/s: py-libp2p drops above 10/s per link and topic."""
    commit_batch_seconds: Seconds = 0.02
    """Writes within this time share one transaction."""
    liveness: LivenessConfig = LivenessConfig()
    max_entries: Count = 200_000
    """Slots held; about 1.2 KiB of memory each, with values of 60 B."""
    max_entries_per_author: Count = 20_000
    """One author cannot fill the store."""
    max_pending_puts: Count = 1024
    """Local writes waiting for their commit; further ones wait for a place."""
    max_push_backlog: Count = 4096
    """Entries waiting for gossip; beyond it they wait for reconciliation."""
