"""One round's questions: which peers see us where, and which can dial us back."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from fabric.core.errors import FabricError, PeerTimeout
from fabric.core.ids import PeerId, short
from fabric.net.traversal_api import ConnectionInfo, TraversalHost
from nat.addresses import endpoint_of
from nat.reachability.autonat import AddressVerdict
from nat.reachability.autonat_client_service import AutonatAsker
from nat.reachability.config import ReachabilityConfig
from nat.reachability.core import Candidate
from nat.reachability.observed import ObservedAddresses
from nat.reachability.observed_mapping import Observation
from nat.reachability.observed_service import observe_from

log = logging.getLogger(__name__)

MAX_OBSERVERS = 8
"""Peers that are asked where they see us, per round."""
IDENTIFY_SECONDS = 5.0


class Seen(Protocol):
    """What identify answers, see :class:`fabric.net.libp2p_identify.Identified`."""

    @property
    def observed(self) -> str | None:
        """Where the peer sees our end, "ip:port"."""
        ...

    @property
    def connection(self) -> ConnectionInfo:
        """The connection that was asked."""
        ...


Identify = Callable[[PeerId], Awaitable[Seen]]


class Survey:
    """Asks the connected peers.

    Args:
        host: Whose addresses are in question.
        identify: Asks one peer where it sees us.
        asker: Asks one server to dial us.
        config: How many are asked.
        observed: Where observations go.

    Attributes:
        refused: Who could not be asked in the last round, with the code.
    """

    def __init__(
        self,
        host: TraversalHost,
        identify: Identify,
        asker: AutonatAsker,
        config: ReachabilityConfig,
        observed: ObservedAddresses,
    ) -> None:
        self.refused: dict[PeerId, str] = {}
        self._host = host
        self._identify = identify
        self._asker = asker
        self._config = config
        self._observed = observed

    def direct_peers(self) -> dict[PeerId, str]:
        """Return whom to ask, with their IPs: different IPs first, else by chance."""
        peers = list(self._host.connected())
        random.shuffle(peers)
        found: dict[PeerId, str] = {}
        for peer in peers:
            for info in self._host.connections(peer):
                end = endpoint_of(info.remote)
                if info.kind == "direct" and end is not None:
                    found[peer] = str(end[0])
                    break
        first: dict[str, PeerId] = {}
        for peer, ip in found.items():
            first.setdefault(ip, peer)
        order = [*first.values(), *found]
        return {peer: found[peer] for peer in dict.fromkeys(order)}

    async def observe(self, peers: Sequence[PeerId]) -> dict[PeerId, str]:
        """Ask where peers see us; return the IPs they saw."""
        seen: dict[PeerId, str] = {}

        async def question(peer: PeerId) -> None:
            try:
                with trio.fail_after(IDENTIFY_SECONDS):
                    answer = await self._identify(peer)
            except (FabricError, trio.TooSlowError) as exc:
                log.debug("identify.failed peer=%s error=%r", short(peer), exc)
                return
            end = endpoint_of(answer.observed) if answer.observed else None
            if end is not None:
                seen[peer] = str(end[0])
                self._note(peer, answer)

        async with trio.open_nursery() as nursery:
            for peer in peers[:MAX_OBSERVERS]:
                nursery.start_soon(question, peer)
        return seen

    async def observe_listeners(self, addresses: Sequence[str], port: int) -> None:
        """Ask data-plane listeners ("ip:port") where they see our ``port``."""
        ends = [end for end in map(endpoint_of, addresses) if end is not None]

        async def question(target: tuple[str, int]) -> None:
            try:
                with trio.fail_after(IDENTIFY_SECONDS):
                    self._observed.add(await observe_from(port, target))
            except (FabricError, trio.TooSlowError) as exc:
                log.debug("observe.failed target=%s error=%r", target[0], exc)

        async with trio.open_nursery() as nursery:
            for ip, number in ends[:MAX_OBSERVERS]:
                nursery.start_soon(question, (str(ip), number))

    def _note(self, peer: PeerId, answer: Seen) -> None:
        """Keep an observation of a connection that left from a listening port."""
        info = answer.connection
        local, remote = endpoint_of(info.local), endpoint_of(info.remote)
        ports = {end[1] for end in map(endpoint_of, self._host.listen_addrs()) if end}
        if not info.outbound or local is None or local[1] not in ports:
            return
        self._observed.add(
            Observation(
                observer=peer,
                observer_ip=str(remote[0]) if remote else "",
                local=info.local,
                observed=answer.observed or "",
                at=trio.current_time(),
            )
        )

    async def ask(
        self,
        servers: dict[PeerId, str],
        asked: Sequence[Candidate],
        seen_ips: dict[PeerId, str],
    ) -> dict[PeerId, tuple[AddressVerdict, ...]]:
        """Return what up to ``max_servers`` found; others replace those that refuse.

        Args:
            servers: Whom to ask, the best first.
            asked: The addresses in question.
            seen_ips: Where each server sees us.
        """
        addresses = [each.address for each in asked]
        seconds = self._config.autonat.request_seconds * len(addresses)
        found: dict[PeerId, tuple[AddressVerdict, ...]] = {}
        self.refused = {}

        async def question(peer: PeerId) -> None:
            try:
                with trio.fail_after(seconds):
                    found[peer] = await self._asker.ask(
                        peer, addresses, seen_ips.get(peer, "")
                    )
            except trio.TooSlowError:
                self.refused[peer] = PeerTimeout("no answer").code
            except FabricError as exc:
                self.refused[peer] = exc.code

        waiting = list(servers)[: 2 * self._config.max_servers]
        while waiting and len(found) < self._config.max_servers:
            room = self._config.max_servers - len(found)
            async with trio.open_nursery() as nursery:
                for peer in waiting[:room]:
                    nursery.start_soon(question, peer)
            waiting = waiting[room:]
        return found
