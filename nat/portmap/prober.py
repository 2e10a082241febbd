"""Send the questions of a search, and repeat them until they are answered."""

from __future__ import annotations

import random
from collections.abc import Mapping as MappingOf
from math import inf

from nat.portmap import pmp
from nat.portmap.config import Method, PortMapConfig
from nat.portmap.keeper import LeaseKeeper
from nat.portmap.outbox import Outbox
from nat.portmap.search import MethodSearch
from nat.portmap.timing import PCP_FIRST_SECONDS, PMP_FIRST_SECONDS, Retransmission
from nat.portmap.upnp_messages import UpnpSearch


class Prober:
    """Searches at the keeper's gateway.

    PCP is asked for the first port's mapping, NAT-PMP for the external address, UPnP
    for its description.

    Attributes:
        winner: The method that worked last on this network.
    """

    def __init__(
        self,
        config: PortMapConfig,
        keeper: LeaseKeeper,
        outbox: Outbox,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._outbox = outbox
        self._rng = rng
        self._search: MethodSearch | None = None
        self._repeats: dict[Method, Retransmission] = {}
        self.winner: Method | None = None

    @property
    def searching(self) -> bool:
        """Whether a search is on."""
        return self._search is not None

    def begin(self, failures: MappingOf[Method, str], now: float) -> None:
        """Ask by every method but those that failed a moment ago."""
        gateway = self._keeper.gateway
        assert gateway is not None, "nobody to ask"
        methods = [
            method
            for method in self._config.methods
            if method == "pcp" or not gateway.is_ipv6
        ]
        self._search = MethodSearch(methods, self._config, now, self.winner)
        for method, reason in failures.items():
            self._search.fail(method, reason)
        self._repeats.clear()
        for method in self._search.open:
            self._ask(method)
            if method != "upnp":
                pause = PCP_FIRST_SECONDS if method == "pcp" else PMP_FIRST_SECONDS
                self._repeats[method] = Retransmission(pause, now, self._rng)

    def stop(self) -> None:
        """End the search; answers to it are late from now on."""
        self._search = None
        self._repeats.clear()

    def works(self, method: Method, now: float) -> None:
        """Note a good answer, if a search is on."""
        self._repeats.pop(method, None)
        if self._search is not None:
            self._search.works(method, now)

    def fail(self, method: Method, reason: str) -> None:
        """Note that ``method`` cannot serve, if a search is on."""
        self._repeats.pop(method, None)
        if self._search is not None:
            self._search.fail(method, reason)

    def choose(self, now: float) -> Method | None:
        """Return the method that won, and remember it."""
        method = self._search.choose(now) if self._search is not None else None
        if method is not None:
            self.winner = method
        return method

    def failures(self, now: float) -> dict[Method, str] | None:
        """Return who failed why when the search ended without result, else None."""
        if self._search is None or not self._search.over(now):
            return None
        return self._search.failures

    def on_timeout(self, now: float) -> None:
        """Repeat the questions that are due."""
        for method, repeat in self._repeats.items():
            if now >= repeat.at:
                repeat.sent(now)
                self._ask(method)

    def next_timeout(self) -> float:
        """Return when to look again."""
        if self._search is None:
            return inf
        repeats = [repeat.at for repeat in self._repeats.values()]
        return min([self._search.next_timeout(), *repeats])

    def _ask(self, method: Method) -> None:
        gateway, first = self._keeper.gateway, self._keeper.first
        assert gateway is not None, "nobody to ask"
        if method == "pcp":
            first.asking("pcp")
            self._outbox.send(self._keeper.encode(first, "pcp", lifetime=None))
        elif method == "nat-pmp":
            self._outbox.send(pmp.encode_address_request())
        else:
            self._outbox.call(
                UpnpSearch(gateway=gateway.address, source=gateway.source)
            )
