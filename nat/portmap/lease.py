"""One port and what the router promised for it.

::

    idle --ask--> pending --granted--> held --renew_at--> held and pending --granted--+
      ^              |                  ^ |                                            |
      +---refused----+                  | +----------expires_at (Lost)---> idle        |
                                        +----------------------------------------------+
"""

from __future__ import annotations

import random
from math import inf

import msgspec

from nat.portmap.api import Mapping
from nat.portmap.config import Method, PortMapConfig
from nat.portmap.pcp import NONCE_BYTES
from nat.portmap.timing import Retransmission

MIN_LEASE_SECONDS = 8
"""A shorter one is refused: its half would be under the 4 s that RFC 6887 section
11.2.1 puts between two renewals."""
MAX_LEASE_SECONDS = 24 * 3600
"""Longest lifetime that is believed (RFC 6887 section 15)."""
_RANDOM_PORTS = (10240, 65535)


class WantedPort(msgspec.Struct, frozen=True, kw_only=True):
    """A TCP port to be mapped.

    Attributes:
        internal_port: The port we listen on.
        external_port: The port to ask for; 0 is the same.
    """

    internal_port: int
    external_port: int = 0


class Lease:
    """State of one wanted port.

    Attributes:
        mapping: What the router granted, while it holds.
        nonce: Names the mapping towards a PCP server.
        asked_by: Methods by which this router was asked; each may have granted.
        asked_port: External port of the last request.
        renew_at: When to ask (again).
        expires_at: When the mapping is gone unless renewed.
        give_up_at: When a request without an answer counts as refused.
        resend: Pauses of the datagram in flight.
        calling: Whether a UPnP call is in flight.
        verifying: Whether an unanswered request means that the mapping is gone.
        refusal: The last refusal, or "".
        conflicts: External ports that others had, since the last grant.
    """

    def __init__(self, wanted: WantedPort, rng: random.Random) -> None:
        self.internal_port = wanted.internal_port
        self._rng = rng
        self._wanted_port = wanted.external_port or wanted.internal_port
        self.mapping: Mapping | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the router: this is another network."""
        self.mapping = None
        self.nonce = self._rng.randbytes(NONCE_BYTES)
        self.asked_by: set[Method] = set()
        self.asked_port = self._wanted_port
        self.renew_at = inf
        self.expires_at = inf
        self.refusal = ""
        self.conflicts = 0
        self.settle()

    @property
    def pending(self) -> bool:
        """Whether an answer is awaited."""
        return self.resend is not None or self.calling

    def settle(self) -> None:
        """Note that the request in flight is answered or given up."""
        self.resend: Retransmission | None = None
        self.calling = self.verifying = False
        self.give_up_at = inf

    def asking(self, method: Method) -> int:
        """Note a request by ``method``; return the external port to ask for."""
        self.asked_by.add(method)
        self.renew_at = inf
        if self.mapping is not None:
            self.asked_port = self.mapping.external_port
        return self.asked_port

    def grant(self, mapping: Mapping, config: PortMapConfig, now: float) -> None:
        """Hold ``mapping`` and plan its renewal."""
        self.settle()
        self.refusal = ""
        self.conflicts = 0
        self.mapping = mapping
        half = mapping.lease_seconds / 2
        self.expires_at = now + mapping.lease_seconds
        self.renew_at = now + min(half, config.refresh_seconds)

    def drop(self) -> Mapping | None:
        """Hold nothing any more; return what was held."""
        held, self.mapping = self.mapping, None
        self.expires_at = inf
        return held

    def take_other_port(self) -> None:
        """Ask for another external port: somebody has this one.

        A random one, so that hosts that all want the same do not meet again.
        """
        self.conflicts += 1
        self.asked_port = self._rng.randint(*_RANDOM_PORTS)

    def next_timeout(self) -> float:
        """Return the next of this lease's times."""
        resend = self.resend.at if self.resend is not None else inf
        return min(self.renew_at, self.expires_at, self.give_up_at, resend)
