"""The error hierarchy. One question decides the class: *who must act?*

Every exception that crosses a package boundary derives from :class:`FabricError` and
carries what a person needs: a stable ``code``, a ``reason`` and a ``next_step``.
``trio.Cancelled`` is never caught. ``trio.TooSlowError`` is mapped to
:class:`PeerTimeout` at the edge of a trio shell.
"""

from __future__ import annotations


class FabricError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        reason: What happened, with the facts ("frame of 70 B > 64 B").
        code: Stable name for machines and documentation; a class has a default.
        next_step: What the reader can do now, or empty.

    Attributes:
        exit_code: Exit status of a command that ends with this error.
    """

    default_code = "E_FAILED"
    exit_code = 1

    def __init__(self, reason: str, *, code: str = "", next_step: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code or self.default_code
        self.next_step = next_step


class ConfigError(FabricError):
    """The operator must act: a setting is missing, unknown or out of range."""

    default_code = "E_CONFIG"
    exit_code = 2


class LocalProtocolError(FabricError):
    """We must act: our own code asked a protocol core for an illegal step."""

    default_code = "E_BUG"


class RemoteProtocolError(FabricError):
    """The peer misbehaved: malformed bytes or an illegal transition. Count it."""

    default_code = "E_PROTOCOL"


class RemoteRefused(FabricError):
    """The peer answered correctly, and the answer is no.

    Args:
        reason: The peer's reason.
        code: The peer's code.
        next_step: The peer's advice.
        retry_after_seconds: Earliest time at which asking again makes sense; 0 = never.
    """

    default_code = "E_REFUSED"
    exit_code = 4

    def __init__(
        self,
        reason: str,
        *,
        code: str = "",
        next_step: str = "",
        retry_after_seconds: float = 0.0,
    ) -> None:
        super().__init__(reason, code=code, next_step=next_step)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(FabricError):
    """Nobody is at fault: a peer left or was slow. Retry elsewhere, with backoff."""

    default_code = "E_UNAVAILABLE"
    exit_code = 3


class PeerTimeout(Unavailable):
    """The deadline passed before the peer answered."""

    default_code = "E_TIMEOUT"
    exit_code = 7


class NoRoute(Unavailable):
    """No known address of the peer answers."""

    default_code = "E_NO_ROUTE"


class QuorumLost(Unavailable):
    """Too few participants answer for a decision that must not be taken twice."""

    default_code = "E_NO_QUORUM"


class IntegrityError(FabricError):
    """Bytes, signature or attestation do not match. Never retry the same source."""

    default_code = "E_INTEGRITY"
    exit_code = 8


class ResourceExhausted(FabricError):
    """One of our own bounds was reached. Shed load; do not grow."""

    default_code = "E_RESOURCES"
    exit_code = 6
