"""Discovery as a service: a rendezvous point for others, visits to others' points.

What is found goes to the peer book as hints; the local network has a service of its own
(``mdns_service.py``), because it needs threads and may be impossible on this machine.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from fabric.core.errors import FabricError, PeerTimeout
from fabric.core.ids import MeshId, PeerId, short
from fabric.core.signing import Signer
from fabric.net.host import Host
from nat.discovery.config import DiscoveryConfig
from nat.discovery.core import Discovery, Islands, Visit, namespace_of
from nat.discovery.rendezvous import MAX_TTL_SECONDS, PointLimits
from nat.discovery.rendezvous_messages import PAGE
from nat.discovery.rendezvous_records import PeerRecord, Sighting
from nat.discovery.rendezvous_service import PointService, RendezvousClient

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""How soon a new candidate or a change of our addresses is noticed."""
VISIT_SECONDS = 45.0
"""One visit: a dial, a registration and all pages."""
DIAL_SECONDS = 15.0
MAX_PAGES = 10
LEAVE_SECONDS = 1.0
"""At the end: telling the points that we are gone is a courtesy."""

Learn = Callable[[Mapping[PeerId, Sequence[str]]], None]
"""Takes addresses of peers, as hints."""


@dataclass(frozen=True)
class DiscoveryPorts:
    """What discovery needs from above.

    Attributes:
        candidates: Rendezvous points to consider, best first (``order_points``).
        addrs_of: What is known about the addresses of a candidate.
        is_member: Whether a peer is a member of our mesh.
        learn: Takes what was found.
    """

    candidates: Callable[[], Sequence[PeerId]]
    addrs_of: Callable[[PeerId], Sequence[str]]
    is_member: Callable[[PeerId], bool]
    learn: Learn


class DiscoveryService:
    """Registers at rendezvous points, asks them, and serves as one.

    Args:
        host: Opens and serves streams.
        signer: Our identity.
        mesh: Whose members we look for.
        config: Numbers and switches.
        ports: What it needs from above.
    """

    def __init__(
        self,
        host: Host,
        signer: Signer,
        mesh: MeshId,
        config: DiscoveryConfig,
        ports: DiscoveryPorts,
    ) -> None:
        self._host = host
        self._config = config
        self._ports = ports
        self._namespace = namespace_of(mesh)
        self._core = Discovery(host.peer_id, config, random.Random())
        self._client = RendezvousClient(host, signer)
        self._wake = trio.Event()
        self._own_names: set[PeerRecord] = set()
        self._own_at = float("-inf")
        self.served: PointService | None = None
        if config.rendezvous_serve:
            limits = PointLimits(
                config.max_registrations,
                config.max_stranger_registrations,
                config.max_registrations_per_peer,
            )
            self.served = PointService(host, limits, ports.is_member)

    @property
    def namespace(self) -> str:
        """Where members of our mesh register."""
        return self._namespace

    def islands(self) -> Islands:
        """Return what rendezvous knows, against what we are connected with."""
        return self._core.islands(self._host.connected(), trio.current_time())

    def network_changed(self) -> None:
        """Ask again soon: addresses or routes have changed."""
        self._core.hurry(trio.current_time())
        self._wake.set()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep registering and asking until cancelled; then unregister."""
        task_status.started()
        if not self._config.rendezvous:
            await trio.sleep_forever()
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    self._step(nursery)
                    with trio.move_on_after(TICK_SECONDS):
                        await self._wake.wait()
                    self._wake = trio.Event()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(LEAVE_SECONDS):
                await self._leave()

    def _step(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        self._core.set_candidates(self._ports.candidates())
        self._core.set_addrs(self._host.addrs())
        self._take_own(now)
        for visit in self._core.due(now):  # one at a time per point, a few points
            nursery.start_soon(self._visit, visit)

    async def _visit(self, visit: Visit) -> None:
        """Register and ask; the core learns how it went."""
        try:
            with trio.fail_after(VISIT_SECONDS):
                sightings, cookie = await self._exchange(visit)
        except trio.TooSlowError:
            slow = PeerTimeout(f"{short(visit.point)} took over {VISIT_SECONDS:g} s")
            self._core.on_failed(visit, slow, trio.current_time())
        except FabricError as exc:
            log.debug("visit.failed point=%s code=%s", short(visit.point), exc.code)
            self._core.on_failed(visit, exc, trio.current_time())
        else:
            now = trio.current_time()
            self._core.on_found(visit, sightings, cookie, now)
            self._learn_found(now)

    def _take_own(self, now: float) -> None:
        """Take in what members registered with us, if that changed or time has passed.

        A point is a peer too, and may know none but those that come to it.
        """
        if self.served is None:
            return
        found = self.served.point.registered(self._namespace, now)
        names = {sighting.record for sighting in found}
        if names != self._own_names or now >= self._own_at:
            self._own_names = names
            self._own_at = now + self._config.discover_seconds
            visit = Visit(self._host.peer_id, register=False, cookie=b"")
            self._core.on_found(visit, found, b"", now)
            self._learn_found(now)

    def _learn_found(self, now: float) -> None:
        hints = self._core.hints(self._host.connected(), now)
        if hints:
            self._ports.learn(hints)

    async def _exchange(self, visit: Visit) -> tuple[list[Sighting], bytes]:
        point = visit.point
        if point not in self._host.connected():
            await self._dial(point)
        if visit.register:
            ttl = await self._client.register(
                point,
                self._namespace,
                self._host.addrs(),
                self._config.rendezvous_ttl_seconds,
            )
            ttl = min(ttl, MAX_TTL_SECONDS)
            self._core.on_registered(point, ttl, trio.current_time())
        sightings: list[Sighting] = []
        cookie = visit.cookie
        for _ in range(MAX_PAGES):
            page, cookie = await self._client.discover(point, self._namespace, cookie)
            sightings += page
            if len(page) < PAGE:
                break
        return sightings, cookie

    async def _dial(self, point: PeerId) -> None:
        with trio.move_on_after(DIAL_SECONDS) as scope:
            await self._host.connect(point, self._ports.addrs_of(point))
        if scope.cancelled_caught:
            raise PeerTimeout(f"{short(point)} was not reached in {DIAL_SECONDS:g} s")

    async def _leave(self) -> None:
        """Unregister where we are connected, all at once."""
        points = {report.point for report in self.islands().points if report.registered}
        async with trio.open_nursery() as nursery:
            for point in points & self._host.connected():  # a few points
                nursery.start_soon(self._unregister, point)

    async def _unregister(self, point: PeerId) -> None:
        try:
            await self._client.unregister(point, self._namespace)
        except FabricError as exc:
            log.debug("unregister.failed point=%s code=%s", short(point), exc.code)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("unregister.failed point=%s", short(point))
