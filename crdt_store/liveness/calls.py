"""What the core asks its shell to send."""

from __future__ import annotations

from dataclasses import dataclass

from crdt_store.liveness.messages import NOBODY, Ping
from fabric.core.ids import PeerId


@dataclass(slots=True)
class Probe:
    """A question whether somebody lives, until it is answered or over."""

    ends: float
    waiting: int = 1
    relayed: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """Send ``ping`` to ``peer``; say ``answered`` or ``failed`` by ``deadline``.

    Attributes:
        peer: Whom to call.
        ping: What to say.
        deadline: When silence is an answer.
        about: Whose life it decides; empty when nobody's.
    """

    peer: PeerId
    ping: Ping
    deadline: float
    about: PeerId = NOBODY
