"""What a program, or whoever starts it, may say about its groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import Store

from training.worker.collectives.engine import Connector
from training.worker.collectives.links import Links

DEFAULT_PATIENCE_SECONDS = 20.0
"""Silence of a peer for longer ends a group. A process beats from a thread even while
it computes; only what holds the interpreter for this long looks dead."""
DEFAULT_TIMEOUT = timedelta(minutes=30)
MakeConnector = Callable[[Store, int, Sequence[int]], Connector]
"""(store of the group, our rank in it, global ranks of its members) -> connector."""


@dataclass
class FabricOptions:
    """``pg_options`` of ``init_process_group`` and ``new_group``.

    Attributes:
        patience_seconds: The one knob.
        links: Of the whole world, by global rank; None: equal links.
        algorithm: The one to take where it applies; empty: by estimate.
        same_host: Whether ranks of one host use shared memory.
        tls: Whether ranks that do not share memory use TLS.
        ip: Where to listen; empty: found from the store's address.
        names: Of the world's ranks, for errors; empty: "rank N".
        measure: Whether to measure the links of each group when it is made.
        connector: Where sockets come from; None: ranks meet in the store.
    """

    patience_seconds: float = DEFAULT_PATIENCE_SECONDS
    links: Links | None = None
    algorithm: str = ""
    same_host: bool = True
    tls: bool = True
    ip: str = ""
    names: tuple[str, ...] = ()
    measure: bool = False
    connector: MakeConnector | None = None
    # torch reads and sets these on any options object
    _timeout: timedelta = DEFAULT_TIMEOUT
    global_ranks_in_group: list[int] = field(default_factory=list)
    group_name: str = ""
