"""A connector whose sockets somebody else opens: the daemon, or a test.

    ours     dial -> ask(rank, channel) -> ... -> hand_over(outgoing)  -> Opened
    theirs                             ... -> hand_over(incoming) <- accept

The daemon asks ``paths.open`` for a path of purpose (job, generation, group and
channel) and hands the connected socket to both workers; whoever receives it here has
made TLS of it with the certificates of the offer where the hosts differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from fabric.core.errors import PeerTimeout
from training.worker.collectives.line import Opened

Ask = Callable[[int, str], None]
"""Asks for a connection on which we send to a rank, on a channel; does not wait."""


class HandedConnector:
    """The connections of one rank in one group.

    Args:
        ask: Called once per connection that we want to send on.
        wait_seconds: Longest wait for a connection.
    """

    def __init__(self, ask: Ask, wait_seconds: float) -> None:
        self._ask = ask
        self._wait = wait_seconds
        self._handed: dict[tuple[int, str, bool], Opened] = {}
        self._changed = threading.Condition()
        self._closed = False

    def hand_over(
        self, rank: int, channel: str, opened: Opened, *, outgoing: bool
    ) -> None:
        """Take ``opened``, connected and authenticated; a later one replaces it."""
        with self._changed:
            if self._closed:
                opened.sock.close()
                return
            replaced = self._handed.get((rank, channel, outgoing))
            self._handed[rank, channel, outgoing] = opened
            self._changed.notify_all()
        if replaced is not None:
            replaced.sock.close()

    def dial(self, rank: int, channel: str) -> Opened:
        """Return a connection on which we send to ``rank``.

        Raises:
            PeerTimeout: nobody handed one over.
        """
        self._ask(rank, channel)
        return self._take(rank, channel, outgoing=True)

    def accept(self, rank: int, channel: str) -> Opened:
        """Return the connection on which ``rank`` sends.

        Raises:
            PeerTimeout: nobody handed one over.
        """
        return self._take(rank, channel, outgoing=False)

    def close(self) -> None:
        """Take no more."""
        with self._changed:
            self._closed = True
            left, self._handed = list(self._handed.values()), {}
            self._changed.notify_all()
        for opened in left:
            opened.sock.close()

    def _take(self, rank: int, channel: str, *, outgoing: bool) -> Opened:
        key = (rank, channel, outgoing)
        with self._changed:
            self._changed.wait_for(
                lambda: key in self._handed or self._closed, self._wait
            )
            opened = self._handed.pop(key, None)
        if opened is None:
            way = "to" if outgoing else "from"
            raise PeerTimeout(f"no connection {way} rank {rank} in {self._wait:g} s")
        return opened
