"""Facts about this machine and the mesh, each from one place of the session.

A part may raise a FabricError or an OSError, or be cancelled: then it is unmeasured.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import trio

from fabric.app.addr_text import short_addr
from fabric.app.clock import compare_clock
from fabric.app.net_checks import (
    DialResult,
    dial_multiaddrs,
    dial_tcp,
    endpoint_of_multiaddr,
    has_packet_filter,
    probe_udp,
    route_mtu,
)
from fabric.app.peer_names import name_of
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId, short
from nat.addresses import endpoint_of
from nat.doctor.facts import (
    ClockSample,
    Dialled,
    Link,
    Listening,
    Members,
    PathMtu,
    Refusal,
    Remembered,
    Rendezvous,
)
from nat.doctor.sources import from_islands

if TYPE_CHECKING:
    from fabric.app.diagnose import Traversal
    from fabric.app.session import Session

log = logging.getLogger(__name__)

CLOCK_SECONDS = 4.5
"""Bound of asking all clocks; whoever answered by then counts."""
MAX_ASKED = 8
"""Peers whose clock, route and UDP are tried; more say nothing new."""


async def listening(session: Session) -> Listening:
    """Return where we listen, and what dialling ourselves there came to."""
    control = tuple(map(short_addr, session.host.listen_addrs()))
    ends = dict.fromkeys(
        end
        for addr in session.host.listen_addrs()
        if (end := endpoint_of_multiaddr(addr)) and not _is_loopback(end[0])
    )
    dialled: list[Dialled] = []

    async def dial(ip: str, port: int) -> None:
        result = await dial_tcp(ip, port)
        dialled.append(Dialled(f"{ip}:{port}", result.error))

    async with trio.open_nursery() as nursery:
        for ip, port in list(ends)[:MAX_ASKED]:
            nursery.start_soon(dial, ip, port)
    return Listening(
        control=control,
        data=session.plane.addresses(),
        dialled=tuple(sorted(dialled, key=lambda each: each.addr)),
        has_rules=await trio.to_thread.run_sync(has_packet_filter),
    )


def _is_loopback(ip: str) -> bool:
    return ip == "::1" or ip.startswith("127.")


async def clocks(session: Session) -> tuple[ClockSample, ...]:
    """Return how far the clocks of connected peers are from ours."""
    samples: list[ClockSample] = []

    async def ask(peer: PeerId) -> None:
        try:
            samples.append(
                await compare_clock(session.rpc, peer, name_of(session, peer))
            )
        except FabricError as exc:  # an older version, or it just left
            log.debug("doctor.no_clock peer=%s code=%s", short(peer), exc.code)

    with trio.move_on_after(CLOCK_SECONDS):
        async with trio.open_nursery() as nursery:
            for peer in sorted(session.rpc.connected())[:MAX_ASKED]:
                nursery.start_soon(ask, peer)
    return tuple(sorted(samples, key=lambda sample: sample.peer))


async def mtus(session: Session) -> tuple[PathMtu, ...]:
    """Return what the kernel knows of the routes to peers connected without a relay."""
    found: list[PathMtu] = []

    async def look(peer: PeerId, ip: str, port: int) -> None:
        name = name_of(session, peer)
        result = await dial_tcp(ip, port) if port else DialResult("not dialled")
        if mtu := result.mtu_bytes or route_mtu(ip):
            found.append(PathMtu(name, mtu, result.mss_bytes))

    async with trio.open_nursery() as nursery:
        for peer, (ip, port) in _remote_ends(session).items():
            nursery.start_soon(look, peer, ip, port)
    return tuple(sorted(found, key=lambda path: path.peer))


def _remote_ends(session: Session) -> dict[PeerId, tuple[str, int]]:
    """Return where connected peers are; the port is 0 where nobody need listen.

    Of a connection that the peer opened, or that was punched, the port is its own.
    """
    ends: dict[PeerId, tuple[str, int]] = {}
    for peer in sorted(session.host.connected())[:MAX_ASKED]:
        for info in session.host.connections(peer):
            end = endpoint_of(info.remote) if info.kind != "relay" else None
            if end is not None:
                listens = info.outbound and info.kind == "direct"
                known = ends.get(peer)
                if known is None or (listens and not known[1]):
                    ends[peer] = (str(end[0]), end[1] if listens else 0)
    return ends


async def udp(session: Session) -> str | None:
    """Return what became of UDP datagrams to the machines of connected peers."""
    ips = {
        str(end[0])
        for peer in session.host.connected()
        for info in session.host.connections(peer)
        if info.remote and (end := endpoint_of(info.remote)) is not None
    }
    return await probe_udp(sorted(ips)[:MAX_ASKED])


async def bootstraps(session: Session) -> tuple[Dialled, ...]:
    """Dial the addresses that invites and settings named."""
    addrs = [
        known.addr
        for contact in session.book.contacts.values()
        for known in contact.known.all()
        if known.source in ("invite", "config")
    ]
    direct = [addr for addr in addrs if endpoint_of_multiaddr(addr) is not None]
    return await dial_multiaddrs([(addr, "") for addr in direct[:MAX_ASKED]])


def remembered(session: Session) -> Remembered:
    """Return what a restart would start from."""
    problem = session.peers_file.problem
    return Remembered(
        peers=len(session.book.remembered()),
        problem=None
        if problem is None
        else Refusal(problem.code, problem.reason, problem.next_step),
    )


def rendezvous(session: Session, nat: Traversal) -> Rendezvous:
    """Return how the mesh looks from the rendezvous points."""
    members = session.store.authority.members() - {session.own}
    if (chosen := session.hood.chosen()) is not None:
        members &= chosen  # nobody is connected with the others for long
    return from_islands(nat.islands(), partial(name_of, session), members)


def links(session: Session, nat: Traversal | None) -> tuple[Link, ...] | None:
    """Return the measured links with connected peers."""
    if nat is None:
        return None
    return tuple(
        Link(
            peer=name_of(session, peer),
            path=link.path,
            rtt_seconds=link.rtt_seconds,
            up=link.up_bytes_per_second,
            down=link.down_bytes_per_second,
        )
        for peer in sorted(session.rpc.connected())
        if (link := nat.link(peer)) is not None
    )


def versions(session: Session) -> dict[str, str]:
    """Return the version of each other member."""
    return {
        name_of(session, peer): record.version
        for peer, record in session.store.members.all().items()
        if peer != session.own
    }


def members(session: Session) -> Members:
    """Return who belongs to the mesh, who is connected and who is long gone."""
    known = session.store.authority.members() - {session.own}
    connected = session.rpc.connected() & known
    stale = known - set(session.store.members.all()) - connected
    return Members(
        known=tuple(sorted(name_of(session, peer) for peer in known)),
        connected=tuple(sorted(name_of(session, peer) for peer in connected)),
        stale=tuple(sorted(name_of(session, peer) for peer in stale)),
        on_demand=tuple(
            sorted(name_of(session, peer) for peer in session.hood.on_demand())
        ),
    )
