"""Whether a peer still acknowledges: a machine that is gone, told from a slow reader.

TCP_USER_TIMEOUT ends both (see ``socket_options.py``). Here a connection is dead when
bytes were sent and nothing at all was acknowledged for six seconds; the kernel of a
peer that has no room goes on to acknowledge.
"""

from __future__ import annotations

from fabric.net.socket_options import USER_TIMEOUT_MILLISECONDS
from fabric.net.tcp_info import TcpInfo

SILENT_SECONDS = USER_TIMEOUT_MILLISECONDS / 1000
_UNANSWERED_PROBES = 2
"""A peer without room answers every probe; one may be under way."""


class AckWatch:
    """Watches one connection, looked at several times a second."""

    def __init__(self) -> None:
        self._since: float | None = None  # when something waited and none was answered

    def dead(self, info: TcpInfo, now: float, limit: float = SILENT_SECONDS) -> bool:
        """Return whether the peer has been silent for ``limit`` seconds."""
        if info.unacked == 0 and info.probes < _UNANSWERED_PROBES:
            self._since = None
            return False
        since = now if self._since is None else self._since
        self._since = max(since, now - info.last_ack_milliseconds / 1000)
        return now - self._since >= limit
