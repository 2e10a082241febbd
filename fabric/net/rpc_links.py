"""Which of a peer's RPC connections carries its calls.

Two peers that dial each other at once have two connections for a moment. Both sides
keep the better path, of two alike the one dialled by the lower PeerId. But who dials
anew may have lost what it had, and the other side does not know that yet: so the one
that would stay must first show that it is alive, and until then the new one, which
works, carries the calls. The loser is drained, not cut, so no call breaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fabric.core.ids import PeerId
from fabric.net.rpc_connection import RpcConnection


class Links:
    """The connections of one RPC service, by peer."""

    def __init__(self) -> None:
        self._live: dict[PeerId, RpcConnection] = {}
        self._all: set[RpcConnection] = set()  # live, draining, or in doubt

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[RpcConnection]:
        return iter(tuple(self._all))

    def live(self, peer: PeerId) -> RpcConnection | None:
        """Return the connection that carries calls to ``peer``, or None."""
        return self._live.get(peer)

    def peers(self) -> frozenset[PeerId]:
        """Return the peers with a live connection."""
        return frozenset(self._live)

    def add(self, connection: RpcConnection) -> None:
        """Take in a connection that was authenticated just now."""
        self._all.add(connection)
        existing = self._live.get(connection.peer)
        self._live[connection.peer] = connection
        if existing is None:
            return
        if _keeps(existing, connection):
            existing.doubt(partial(self._proved, existing))
        else:
            existing.drain()

    def remove(self, connection: RpcConnection) -> None:
        """Forget a connection that ended; another one takes over if there is one."""
        self._all.discard(connection)
        if self._live.get(connection.peer) is not connection:
            return
        del self._live[connection.peer]
        for other in self._all:
            if other.peer == connection.peer and not other.is_draining:
                self._live[other.peer] = other

    def retire(self, peer: PeerId) -> None:
        """Drain all connections with ``peer``; the next call dials anew."""
        self._live.pop(peer, None)
        for connection in self._all:
            if connection.peer == peer:
                connection.retired = True
                connection.drain()

    def _proved(self, connection: RpcConnection) -> None:
        """``connection`` is alive after all: of it and the live one the better stays"""
        current = self._live.get(connection.peer)
        if current is connection or connection.retired:
            return
        if current is None or _keeps(connection, current):
            self._live[connection.peer] = connection
            if current is not None:
                current.drain()
        else:
            connection.drain()


def _keeps(existing: RpcConnection, new: RpcConnection) -> bool:
    """Whether ``existing`` stays when ``new`` joins it: both sides decide alike.

    A relayed one yields to a better one. Of two alike the one dialled by the lower
    PeerId stays; of two with one initiator the newer: that peer dials again only after
    it lost the older.
    """
    relayed = (existing.kind == "relay", new.kind == "relay")
    if relayed[0] != relayed[1]:
        return relayed[1]
    return existing.initiator < new.initiator
