"""Join through any member that an invite names: all at once, the first yes wins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from fabric.app.roster import by_peer
from fabric.core.errors import FabricError, NoRoute, PeerTimeout, RemoteRefused
from fabric.core.ids import PeerId, short
from fabric.net.tasks import collapse_group

MAX_AT_ONCE = 8
"""Members asked at once: an invite names no more."""
MAX_MEMBERS = 32
"""Members asked in all: those of the invite and those of the configuration."""
REFUSAL_GRACE_SECONDS = 2.0
"""After a member's no the others have this long for a yes: one may not have heard yet
what another knows, and an admission takes less."""

Admit = Callable[[PeerId, Sequence[str]], Awaitable[object]]
"""Dials a member at these addresses and returns once it has admitted us."""


class _Answers:
    def __init__(self) -> None:
        self.admitted: PeerId | None = None
        self.refusals: dict[PeerId, RemoteRefused] = {}
        self.failures: dict[PeerId, FabricError] = {}


async def join_any(bootstrap: Sequence[str], admit: Admit, *, seconds: float) -> PeerId:
    """Return the first member of ``bootstrap`` that admitted us; the rest is cancelled.

    Args:
        bootstrap: Multiaddrs ending in ``/p2p/<peer>``; those of one peer go together.
        admit: Dials and asks one member. Cancelled when another was faster.
        seconds: Bound of each attempt.

    Raises:
        RemoteRefused: some member answered, with no, and none with yes.
        NoRoute: none answered; the reason lists each address and why.
    """
    members = dict(list(by_peer(bootstrap).items())[:MAX_MEMBERS])
    if not members:
        raise NoRoute("the invite names no address", next_step="ask for a new token")
    answers = _Answers()
    limit = trio.CapacityLimiter(MAX_AT_ONCE)
    with collapse_group():
        async with trio.open_nursery() as nursery:
            for peer, addrs in members.items():  # at most MAX_MEMBERS
                attempt = _Attempt(peer, addrs, seconds, nursery.cancel_scope)
                nursery.start_soon(_ask, attempt, admit, limit, answers)
    if answers.admitted is not None:
        return answers.admitted
    if answers.refusals:
        raise _definite(answers.refusals)
    raise _nobody(members, answers.failures)


class _Attempt:
    def __init__(
        self,
        peer: PeerId,
        addrs: Sequence[str],
        seconds: float,
        all_attempts: trio.CancelScope,
    ) -> None:
        self.peer = peer
        self.addrs = addrs
        self.seconds = seconds
        self.all_attempts = all_attempts


async def _ask(
    attempt: _Attempt, admit: Admit, limit: trio.CapacityLimiter, answers: _Answers
) -> None:
    peer = attempt.peer
    try:
        async with limit:
            with trio.fail_after(attempt.seconds):
                await admit(peer, attempt.addrs)
    except RemoteRefused as exc:
        answers.refusals[peer] = exc
        latest = trio.current_time() + REFUSAL_GRACE_SECONDS
        scope = attempt.all_attempts
        scope.deadline = min(scope.deadline, latest)
    except FabricError as exc:
        answers.failures[peer] = exc
    except trio.TooSlowError:
        answers.failures[peer] = PeerTimeout(
            f"{short(peer)} did not finish within {attempt.seconds:g} s"
        )
    else:
        if answers.admitted is None:
            answers.admitted = peer
        attempt.all_attempts.cancel()


def _definite(refusals: dict[PeerId, RemoteRefused]) -> RemoteRefused:
    """Return the refusal that waiting will not change, else any."""
    return min(refusals.values(), key=lambda no: no.retry_after_seconds > 0)


def _nobody(
    members: dict[PeerId, list[str]], failures: dict[PeerId, FabricError]
) -> NoRoute:
    parts = []
    for peer, addrs in members.items():
        error = failures.get(peer)
        why = "not tried" if error is None else f"{error.code}: {error.reason}"
        parts.append(f"{short(peer)} at {', '.join(addrs)}: {why}")
    return NoRoute(
        f"none of {len(members)} members answers: " + "; ".join(parts),
        next_step="check this machine's network with `fabric doctor`, or ask for a "
        "new token: addresses change",
    )
