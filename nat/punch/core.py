"""One punch as its two ends play it: timing, retries, and which socket they keep. Pure.

A NAT that silently drops an early SYN needs one try: the later of the two SYNs finds
the hole that the earlier one made. A NAT that answers RST closes that hole again, so
two SYNs must be under way at once. With a one-way time of L and f tries a second on
each side that happens 2 * L * f * f times a second: a far peer is crossed at the first
tries, which its refusals pace; a near one, with an L of some microseconds, only while
both try without delay. So both do that in short bursts, which begin at the same moments
counted from SYNC, and in between now and then.
"""

from __future__ import annotations

import hmac
import random
from typing import Literal

from nat.punch.config import PunchConfig

BURST_SECONDS = 0.15
_BURST_TRIES = 200
_NEAR_TRIES = 8
_NEAR_SECONDS = 0.001
_LEAST_PATIENCE_SECONDS = 0.05
_MAX_RTT_SECONDS = 2.0

Verdict = Literal["reply", "won", "stranger", "late"]


def round_trip(connect_to_connect: float, held_seconds: float = 0.0) -> float:
    """Return the round trip; after SYNC the initiator waits half of it.

    Args:
        connect_to_connect: Seconds from sending CONNECT to receiving the other.
        held_seconds: How much of that the responder says it spent (it may lie, so the
            result is bounded on both sides).

    Source: DCUtR, step 4.
    """
    rtt = max(0.0, connect_to_connect - max(0.0, held_seconds))
    return min(rtt, _MAX_RTT_SECONDS)


class RetrySchedule:
    """When to send the next SYN to one address.

    Args:
        config: Bounds.
        rng: Draws the jitter; two sides must not draw alike.
        rtt: Round trip of the control stream in seconds.
        side: 0 or 1; the two ends differ.
    """

    def __init__(
        self, config: PunchConfig, rng: random.Random, rtt: float, side: int
    ) -> None:
        self._config = config
        self.side = side
        self._rng = rng
        self._patience = max(_LEAST_PATIENCE_SECONDS, 3 * rtt)
        self.tries = 0
        self.near = False
        """Whether this burst's tries are refused so fast that the other end is, as
        likely as not, on this machine."""
        self._burst = -1
        self._left = 0
        self._began = 0.0

    def patience(self) -> float:
        """Return how long to wait for an answer to a SYN.

        The kernel repeats one after a second, which is a third of the punch; a hole
        that closed meanwhile needs a new one earlier. Shorter than the way there and
        back it must not be, or no answer would ever be waited for.
        """
        return self._patience * self._rng.uniform(0.75, 1.25)

    def next_delay(self, elapsed: float) -> float | None:
        """Return the seconds to wait before the next try; None when that was all.

        Args:
            elapsed: Seconds since this side's start.
        """
        if self.tries >= self._config.max_tries:
            return None
        self.tries += 1
        burst = int(elapsed / BURST_SECONDS)
        if burst != self._burst:
            self._burst, self._left, self._began = burst, _BURST_TRIES, elapsed
        done = _BURST_TRIES - self._left
        self.near = (
            done == _NEAR_TRIES and elapsed - self._began < _NEAR_TRIES * _NEAR_SECONDS
        )
        if self._left:
            self._left -= 1
            return 0.0
        return self._rng.uniform(0.0, self._config.max_jitter_seconds)


class SocketAgreement:
    """Lets both ends keep the same one of several connected sockets.

    The initiator shows its nonce on each; the responder answers on the first where it
    saw it, and on no other. So the one with an answer is the one that both hold, even
    if connections crossed. Neither nonce is secret from who answers in place of the
    peer: that TLS tells apart, later.
    """

    def __init__(self, *, initiator: bool, own: bytes, peer: bytes) -> None:
        self._initiator = initiator
        self._own = own
        self._peer = peer
        self._decided = False

    @property
    def greeting(self) -> bytes:
        """What to send on every socket that connects."""
        return self._own if self._initiator else b""

    @property
    def reply(self) -> bytes:
        """What to send on the socket whose verdict was "reply"."""
        return self._own

    def judge(self, shown: bytes) -> Verdict:
        """Decide about a socket on which the peer showed ``shown``.

        Returns:
            "reply": send the reply, then it is the socket; "won": it is the socket;
            "stranger": somebody else's; "late": another one was chosen.
        """
        if not hmac.compare_digest(shown, self._peer):
            return "stranger"
        if self._decided:
            return "late"
        self._decided = True
        return "won" if self._initiator else "reply"

    def broke(self) -> None:
        """Take a decision back: the chosen socket broke before the reply left."""
        self._decided = False
