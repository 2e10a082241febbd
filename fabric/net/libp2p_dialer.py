"""All addresses of a peer at once; the first that authenticates wins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import trio
from libp2p.abc import INetConn
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from fabric.core.errors import FabricError, IntegrityError, NoRoute
from fabric.core.ids import PeerId, short
from fabric.net.libp2p_errors import LIBP2P_BROKEN, libp2p_errors
from fabric.net.libp2p_transport import FROM_ANY_PORT

CIRCUIT = "/p2p-circuit"
"""An address that contains this leads through a relay."""
HEAD_START_SECONDS = 0.2
"""Direct addresses are tried alone for this long: a circuit costs the relay bytes."""


class _Attempts:
    """What became of each address."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}
        self.impostors: list[str] = []
        self.connections: list[INetConn] = []


async def dial(
    swarm: Swarm,
    peer: PeerId,
    addrs: Sequence[str],
    *,
    seconds: float,
    connected: Callable[[], bool],
    circuit: Callable[[str], Awaitable[INetConn]],
) -> None:
    """Connect with ``peer`` at the first of ``addrs`` that answers as it.

    The other attempts are cancelled; one that completed all the same is closed.

    Args:
        swarm: Dials one address.
        peer: Who must answer.
        addrs: Multiaddrs, with or without ``/p2p/<peer>`` at the end.
        seconds: Bound of each attempt.
        connected: Whether the peer connected to us in the meantime.
        circuit: Connects through the relay that an address names.

    Raises:
        IntegrityError: no address answered as ``peer``, one answered as another.
        NoRoute: no address answered.
    """
    attempts = _Attempts()
    target = ID.from_base58(peer)

    async def direct(addr: str) -> INetConn:
        return await _dial_shared(swarm, _transport_part(addr, peer), target)

    async with trio.open_nursery() as nursery:
        await _race(nursery, addrs, direct, circuit, seconds, attempts)
    for surplus in attempts.connections[1:]:
        with suppress(*LIBP2P_BROKEN):
            await surplus.close()
    if attempts.connections or connected():
        return
    if attempts.impostors:
        raise IntegrityError(
            f"{', '.join(attempts.impostors)} answered, but not as {peer}",
            code="E_WRONG_PEER",
            next_step="the address belongs to another peer now: ask for a fresh one",
        )
    raise NoRoute(
        f"no address of {short(peer)} answers: "
        + ("; ".join(f"{a}: {e}" for a, e in attempts.errors.items()) or "none known"),
        next_step="check that the peer runs and that its address is current",
    )


async def _race(
    nursery: trio.Nursery,
    addrs: Sequence[str],
    direct: Callable[[str], Awaitable[INetConn]],
    circuit: Callable[[str], Awaitable[INetConn]],
    seconds: float,
    attempts: _Attempts,
) -> None:
    """Start one attempt per address, circuits after a head start of the others."""
    unique = dict.fromkeys(addrs)
    all_failed = trio.Event()

    async def attempt_direct() -> None:
        async with trio.open_nursery() as attempting:
            for addr in unique:
                if CIRCUIT not in addr:
                    attempting.start_soon(attempt, addr, direct)
        all_failed.set()

    async def attempt(addr: str, open_it: Callable[[str], Awaitable[INetConn]]) -> None:
        if await _dial_one(addr, open_it, seconds, attempts):
            nursery.cancel_scope.cancel()

    nursery.start_soon(attempt_direct)
    with trio.move_on_after(HEAD_START_SECONDS):
        await all_failed.wait()
    for addr in unique:
        if CIRCUIT in addr:
            nursery.start_soon(attempt, addr, circuit)


async def _dial_one(
    addr: str,
    open_it: Callable[[str], Awaitable[INetConn]],
    seconds: float,
    attempts: _Attempts,
) -> bool:
    """Return whether ``addr`` led to the peer."""
    try:
        with libp2p_errors(addr), trio.fail_after(seconds):
            attempts.connections.append(await open_it(addr))
    except trio.TooSlowError:
        attempts.errors[addr] = f"no answer within {seconds:.0f} s"
    except FabricError as exc:
        attempts.errors[addr] = _first_cause(exc)
        if is_mismatch(exc):
            attempts.impostors.append(addr)
    else:
        return True
    return False


async def _dial_shared(swarm: Swarm, maddr: Multiaddr, target: ID) -> INetConn:
    """Dial from the listening port; from another one if the handshake failed there.

    When two peers dial each other's listening port from their own at the same moment,
    TCP makes one connection of both dials (RFC 9293, section 3.5, "simultaneous open"),
    whose ends are both initiators: the handshake fails on both sides at once. Other
    ports cannot collide.
    """
    try:
        return await swarm.dial_addr(maddr, target)
    except BaseLibp2pError as exc:
        if is_mismatch(exc) or not _is_handshake(exc):
            raise
    return await swarm.dial_addr(maddr, target, FROM_ANY_PORT)


def _transport_part(addr: str, peer: PeerId) -> Multiaddr:
    """Return ``addr`` without its ``/p2p/`` part, which must name ``peer``."""
    head, mark, name = addr.partition("/p2p/")
    if mark and name != peer:
        raise ValueError("the address names another peer")
    return Multiaddr(head)


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def is_mismatch(error: BaseException) -> bool:
    """Return whether somebody answered and proved another identity."""
    wrong = (PeerIDMismatchesPubkey, IntegrityError)
    return any(isinstance(cause, wrong) for cause in _causes(error))


def _is_handshake(error: BaseException) -> bool:
    """Return whether a connection was there and failed before it was secure.

    The last cause is then the cryptography's or the socket's; at a limit of ours it is
    the swarm's own, and without a connection it is the transport's.
    """
    chain = _causes(error)
    refused = any(isinstance(cause, OpenConnectionError) for cause in chain)
    return not refused and not isinstance(chain[-1], SwarmException)


def _first_cause(error: BaseException) -> str:
    cause = _causes(error)[-1]
    return str(cause) or type(cause).__name__
