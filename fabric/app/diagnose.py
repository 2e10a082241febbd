"""Collect the doctor's facts from a session; ``nat/doctor/core.py`` judges them.

Each part runs by itself under a bound and may fail or be absent: what is missing stays
None, which the doctor reports as "not measured".
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import trio

from fabric.app import mesh_facts
from fabric.app.net_checks import global_ipv6
from fabric.app.peer_facts import collect_peer
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from fabric.net.ports import LinkMeasurement
from nat.discovery.core import Islands
from nat.doctor.facts import (
    CircuitTried,
    Facts,
    Mdns,
    PortMapping,
    Punched,
    Reachability,
    Relaying,
    Relays,
)

if TYPE_CHECKING:
    from fabric.app.session import Session

log = logging.getLogger(__name__)

PART_SECONDS = 5.0
"""Bound of one part; all run at once, so of the whole."""


class Traversal(Protocol):
    """What the doctor asks of ``session.nat``; None: not known (yet)."""

    def reachability(self) -> Reachability | None:
        """Return the verdict on our own address and NAT."""
        ...

    def port_mapping(self) -> PortMapping | None:
        """Return what the router grants."""
        ...

    def relays(self) -> Relays | None:
        """Return our reservations and who refused one."""
        ...

    def relaying(self) -> Relaying:
        """Return what we do for others."""
        ...

    def peer_nat(self, peer: PeerId) -> Reachability | None:
        """Return what ``peer`` said of its NAT."""
        ...

    def circuits(self, peer: PeerId) -> tuple[CircuitTried, ...] | None:
        """Return the relays that were last tried towards ``peer``."""
        ...

    def punched(self, peer: PeerId) -> Punched | None:
        """Return what the last hole punch towards ``peer`` came to."""
        ...

    def islands(self) -> Islands:
        """Return how the mesh looks from the rendezvous points."""
        ...

    def mdns(self) -> Mdns:
        """Return how it stands with the local network."""
        ...

    def link(self, peer: PeerId) -> LinkMeasurement | None:
        """Return the last measurement of the link with ``peer``."""
        ...


def traversal_of(session: Session) -> Traversal | None:
    """Return the session's traversal, if it has one."""
    found: Traversal | None = getattr(session, "nat", None)
    return found


async def collect(session: Session, peer: PeerId | None = None) -> Facts:
    """Return what can be found out within PART_SECONDS.

    Args:
        session: The running services.
        peer: Also collect the chain towards this peer.
    """
    nat = traversal_of(session)
    parts: dict[str, Callable[[], Awaitable[object]]] = {
        "listening": partial(mesh_facts.listening, session),
        "clocks": partial(mesh_facts.clocks, session),
        "mtus": partial(mesh_facts.mtus, session),
        "udp": partial(mesh_facts.udp, session),
        "bootstraps": partial(mesh_facts.bootstraps, session),
    }
    if peer is not None:
        parts["peer"] = partial(collect_peer, session, nat, peer)
    found: dict[str, Any] = {}
    async with trio.open_nursery() as nursery:
        for name, part in parts.items():
            nursery.start_soon(_run_part, name, part, found)
    facts = Facts(
        own_version=version("peerfabric"),
        ipv6=global_ipv6(),
        links=mesh_facts.links(session, nat),
        versions=mesh_facts.versions(session),
        members=mesh_facts.members(session),
        remembered=mesh_facts.remembered(session),
        **found,
    )
    return facts if nat is None else _with_traversal(facts, nat, session)


def _with_traversal(facts: Facts, nat: Traversal, session: Session) -> Facts:
    return msgspec.structs.replace(
        facts,
        reachability=nat.reachability(),
        port_mapping=nat.port_mapping(),
        relays=nat.relays(),
        relaying=nat.relaying(),
        rendezvous=mesh_facts.rendezvous(session, nat),
        mdns=nat.mdns(),
    )


async def _run_part(
    name: str, part: Callable[[], Awaitable[object]], found: dict[str, Any]
) -> None:
    try:
        with trio.move_on_after(PART_SECONDS) as scope:
            found[name] = await part()
        if scope.cancelled_caught:
            log.info("doctor.part_slow part=%s", name)
    except (FabricError, OSError) as exc:
        log.info("doctor.part_failed part=%s error=%s", name, exc)
