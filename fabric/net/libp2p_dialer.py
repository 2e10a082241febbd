"""All addresses of a peer at once; the first that authenticates wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio
from libp2p.abc import INetConn
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from fabric.core.errors import IntegrityError, NoRoute
from fabric.core.ids import PeerId, short


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
) -> None:
    """Connect with ``peer`` at the first of ``addrs`` that answers as it.

    The other attempts are cancelled; one that completed all the same is closed.

    Args:
        swarm: Dials one address.
        peer: Who must answer.
        addrs: Multiaddrs, with or without ``/p2p/<peer>`` at the end.
        seconds: Bound of each attempt.
        connected: Whether the peer connected to us in the meantime.

    Raises:
        IntegrityError: no address answered as ``peer``, one answered as another.
        NoRoute: no address answered.
    """
    attempts = _Attempts()
    async with trio.open_nursery() as nursery:
        for addr in dict.fromkeys(addrs):
            nursery.start_soon(
                _dial_one, swarm, peer, addr, seconds, attempts, nursery.cancel_scope
            )
    for surplus in attempts.connections[1:]:
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


async def _dial_one(
    swarm: Swarm,
    peer: PeerId,
    addr: str,
    seconds: float,
    attempts: _Attempts,
    others: trio.CancelScope,
) -> None:
    target = ID.from_base58(peer)
    try:
        with trio.fail_after(seconds):
            attempts.connections.append(
                await swarm.dial_addr(_transport_part(addr, peer), target)
            )
    except trio.TooSlowError:
        attempts.errors[addr] = f"no answer within {seconds:.0f} s"
    except (BaseLibp2pError, MultiaddrError, ValueError) as exc:
        attempts.errors[addr] = _first_cause(exc)
        if _is_mismatch(exc):
            attempts.impostors.append(addr)
    else:
        others.cancel()


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


def _is_mismatch(error: BaseException) -> bool:
    return any(isinstance(cause, PeerIDMismatchesPubkey) for cause in _causes(error))


def _first_cause(error: BaseException) -> str:
    cause = _causes(error)[-1]
    return str(cause) or type(cause).__name__
