"""When to send again, and whether the gateway forgot what it had granted.

Both protocols run over UDP and both tell the age of the server's state (its *epoch*)
with every answer. A server that restarted has lost its mappings; its epoch went back,
or grew slower than our clock, and everything has to be asked for again.
"""

from __future__ import annotations

import random

PMP_FIRST_SECONDS = 0.25
"""First pause of NAT-PMP, then doubled (RFC 6886 section 3.1)."""
PCP_FIRST_SECONDS = 3.0
"""First pause of PCP, then doubled, each within 10 % (RFC 6887 section 8.1.1)."""
MAX_PAUSE_SECONDS = 64.0
"""The last pause of NAT-PMP. PCP allows 1024 s, too long to notice a router again."""
_JITTER = 0.1


class Retransmission:
    """The pauses between copies of one request.

    Args:
        first_seconds: Pause after the first copy.
        now: When the first copy went out.
        rng: Spreads the pauses, so that hosts do not speak in step.
    """

    def __init__(self, first_seconds: float, now: float, rng: random.Random) -> None:
        self._rng = rng
        self._pause = first_seconds * self._factor()
        self.at = now + self._pause

    def sent(self, now: float) -> None:
        """Note that another copy went out."""
        self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS) * self._factor()
        self.at = now + self._pause

    def _factor(self) -> float:
        return 1.0 + self._rng.uniform(-_JITTER, _JITTER)


class EpochClock:
    """Compare the server's seconds with ours.

    RFC 6887 section 8.5 calls the state lost when the server's clock went back by more
    than a second, or when either clock outran the other by more than one sixteenth and
    two seconds. NAT-PMP's own rule (RFC 6886 section 3.6: one eighth) is looser; the
    stricter one costs at most a renewal too many.
    """

    def __init__(self) -> None:
        self._server: int | None = None
        self._client = 0.0

    def lost_state(self, epoch: int, now: float) -> bool:
        """Note ``epoch`` and return whether the server lost its mappings since."""
        server, client = self._server, self._client
        self._server, self._client = epoch, now
        if server is None:
            return False
        if epoch + 1 < server:
            return True
        theirs, ours = float(epoch - server), now - client
        return ours + 2 < theirs - theirs / 16 or theirs + 2 < ours - ours / 16
