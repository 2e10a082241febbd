"""What ends a collective, with the one it is about."""

from __future__ import annotations

from fabric.core.errors import FabricError, PeerTimeout, Unavailable


class PeerLost(Unavailable):
    """A member of the group is gone: form a group without it.

    Args:
        peer: Its name.
        rank: Its rank in the group.
        reason: What was seen.
    """

    default_code = "E_PEER_LOST"

    def __init__(self, peer: str, rank: int, reason: str) -> None:
        super().__init__(
            f"{peer} (rank {rank}): {reason}",
            next_step="reconfigure the group with the members that are left",
        )
        self.peer = peer
        self.rank = rank


class PeerSilent(PeerTimeout):
    """A member of the group did nothing for longer than patience, or a deadline.

    Args:
        peer: Its name.
        rank: Its rank in the group.
        reason: What was waited for.
    """

    default_code = "E_PEER_SILENT"

    def __init__(self, peer: str, rank: int, reason: str) -> None:
        super().__init__(
            f"{peer} (rank {rank}): {reason}",
            next_step="reconfigure the group without it, or raise patience",
        )
        self.peer = peer
        self.rank = rank


class Aborted(Unavailable):
    """The group was ended on purpose; operations under way did not happen."""

    default_code = "E_ABORTED"


def blamed(error: FabricError) -> int:
    """Return the rank that ``error`` is about, or -1."""
    return error.rank if isinstance(error, PeerLost | PeerSilent) else -1
