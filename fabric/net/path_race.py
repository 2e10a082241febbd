"""Which path a data-plane connection takes: the race of direct, punched and relayed.

    0 s            plain dials of the peer's addresses worth one, all at once
    0.1 s          those of its control plane's port, which takes labels too
    0.25 s         a hole punch, or as soon as the dials have failed
    relay_after    a circuit through a relay, or as soon as the others have failed

The first connected socket wins and the other attempts are cancelled. RPC asks for a
relay early, because it can move to a better path later; a worker's connection cannot,
so it waits longer for one.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

import trio

from fabric.core.errors import FabricError, NoRoute, Unavailable
from fabric.core.ids import PeerId, short
from fabric.net.failures import network_errors
from fabric.net.offers import parse_address_untrusted
from fabric.net.ports import ALL_PATHS, PathKind, PathProvider
from fabric.net.tcp_dial import connect_any

PUNCH_AFTER_SECONDS = 0.25
"""Head start of plain dials: a round trip within one continent is below it."""
RPC_RELAY_AFTER_SECONDS = 0.3
"""RPC takes a relay this soon; it is upgraded without breaking a call."""
RELAY_AFTER_SECONDS = 2.0
"""Others wait this long for a direct path (DESIGN.md section 2, "Paths upgrade")."""


@dataclass
class _Race:
    """The winner so far, and why the others lost."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    sock: socket.socket | None = None
    kind: PathKind = "direct"
    errors: list[FabricError] = field(default_factory=list)

    async def run(self, kind: PathKind, open_it: Opener, done: trio.Event) -> None:
        try:
            with network_errors(f"no {kind} path"):
                sock = await open_it()
        except FabricError as exc:
            self.errors.append(exc)
        else:
            if self.sock is None:
                self.sock, self.kind = sock, kind
                self.scope.cancel()
            else:
                sock.close()
        finally:
            done.set()


Opener = Callable[[], Awaitable[socket.socket]]


async def open_path(
    peer: PeerId,
    addresses: Sequence[str],
    provider: PathProvider | None,
    *,
    shared: Sequence[str] = (),
    relay_after_seconds: float,
    kinds: Collection[PathKind] = ALL_PATHS,
) -> tuple[socket.socket, PathKind]:
    """Return a connected, non-blocking socket to ``peer``'s data plane, and its kind.

    Bound it with ``trio.fail_after`` at the call site.

    Args:
        peer: Whom to reach.
        addresses: "ip:port" that its offer named; parsed here, from the peer.
        provider: Punches and opens circuits; None knows plain dials only.
        shared: The same, of its control plane's port: second choice.
        relay_after_seconds: Head start of the others before a circuit.
        kinds: The kinds that are wanted.

    Raises:
        NoRoute: nothing led there; the reason has each kind's.
        RemoteProtocolError: an address is malformed.
    """

    def worth_dialling(offered: Sequence[str]) -> list[tuple[str, int]]:
        ranked = offered if provider is None else provider.rank(peer, offered)
        return [parse_address_untrusted(address) for address in ranked]

    first, second = worth_dialling(addresses), worth_dialling(shared)

    async def direct() -> socket.socket:
        if not (first or second):
            raise NoRoute("it offers no address that can be dialled from here")
        sock = await connect_any(first, second)
        return socket.socket(fileno=sock.detach())

    steps: list[tuple[PathKind, float, Opener]] = []
    if "direct" in kinds:
        steps.append(("direct", 0.0, direct))
    if provider is not None and "punched" in kinds:
        punch = provider.punch
        steps.append(("punched", PUNCH_AFTER_SECONDS, lambda: punch(peer)))
    if provider is not None and "relay" in kinds:
        circuit = provider.circuit
        steps.append(("relay", relay_after_seconds, lambda: circuit(peer)))
    race = await _run(steps)
    if race.sock is not None:
        return race.sock, race.kind
    raise _no_route(peer, race.errors)


async def _run(steps: Sequence[tuple[PathKind, float, Opener]]) -> _Race:
    race = _Race()
    try:
        async with trio.open_nursery() as nursery:
            race.scope = nursery.cancel_scope
            earlier: list[trio.Event] = []
            for kind, after, open_it in steps:
                done = trio.Event()
                nursery.start_soon(
                    _start_later, race, kind, open_it, done, after, tuple(earlier)
                )
                earlier.append(done)
    except BaseException:  # cancelled while the losers ended
        if race.sock is not None:
            race.sock.close()
        raise
    return race


async def _start_later(
    race: _Race,
    kind: PathKind,
    open_it: Opener,
    done: trio.Event,
    after_seconds: float,
    earlier: tuple[trio.Event, ...],
) -> None:
    """Run one attempt after its delay, or once all earlier ones have failed."""
    if earlier:
        with trio.move_on_after(after_seconds):
            for event in earlier:
                await event.wait()
    await race.run(kind, open_it, done)


def _no_route(peer: PeerId, errors: Sequence[FabricError]) -> FabricError:
    if len(errors) == 1:
        return errors[0]
    reasons = "; ".join(dict.fromkeys(error.reason for error in errors))
    steps = [error.next_step for error in errors if error.next_step]
    kind = NoRoute if all(isinstance(e, NoRoute) for e in errors) else Unavailable
    return kind(
        f"no path to {short(peer)}: {reasons or 'no kind of path is allowed'}",
        next_step=steps[-1] if steps else f"`fabric doctor --peer {short(peer)}`",
    )
