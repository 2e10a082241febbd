"""Text and tokens: one token is one byte of UTF-8.

The chat template is plain: each message is ``role: content`` on a line of its own, and
the reply is what the model writes after ``assistant:``::

    system: You are brief.
    user: Hello
    assistant:
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


def encode(text: str) -> tuple[int, ...]:
    """Return the tokens of ``text``."""
    return tuple(text.encode())


def render_chat(messages: Iterable[tuple[str, str]]) -> str:
    """Return the prompt of a conversation of (role, content)."""
    lines = [f"{role}: {content}\n" for role, content in messages]
    return "".join(lines) + "assistant:"


class TextStream:
    """Turn generated tokens into text piece by piece, up to a stop string.

    Characters of several bytes come out whole; bytes that are no UTF-8 become U+FFFD.
    Text that may be the beginning of a stop string is held back.

    Args:
        stop: The reply ends before the first of these.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Return the text that is now certain; empty once stopped."""
        # A vocabulary larger than 256 has no text form here.
        return self._take(self._decoder.decode(bytes([token & 0xFF])), final=False)

    def finish(self) -> str:
        """Return what is left at the end of generation."""
        return self._take(self._decoder.decode(b"", final=True), final=True)

    def _take(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = 0 if final else self._beginning_of_a_stop()
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def _beginning_of_a_stop(self) -> int:
        """Return the length of the longest end of the text that begins a stop."""
        return max(
            (
                size
                for s in self._stop
                for size in range(1, len(s))
                if self._held.endswith(s[:size])
            ),
            default=0,
        )
