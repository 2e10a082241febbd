"""Have the router forward our ports: which protocol, which leases, and why not.

::

    IDLE --gateway--> SEARCHING --a method works--> MAPPING --nothing held--> SEARCHING
      ^                   |                            |
      |                   +--nothing works--> RESTING --retry_at--> SEARCHING
      +------- gateway gone or changed (from any) -----+
    any --close--> CLOSING --all removed, or deadline--> done

The shell feeds datagrams, results of UPnP calls, network changes and the time; it takes
commands and events after each. What a router says is a claim: the gateway's address
and an open request are required of every answer, an external address is only a
candidate for reachability, and what strangers can forge (restart announcements) makes
us ask again at most every ``ANNOUNCED_SECONDS``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum, auto
from math import inf

from fabric.core.errors import RemoteProtocolError
from nat.portmap import explain, pcp, pmp
from nat.portmap.answers import AnswerDesk
from nat.portmap.api import Event, Explained, Finding, Mapping, is_assignable, is_global
from nat.portmap.config import Method, PortMapConfig
from nat.portmap.gateway import Gateway
from nat.portmap.keeper import LeaseKeeper
from nat.portmap.lease import WantedPort
from nat.portmap.outbox import Command, Outbox
from nat.portmap.prober import Prober
from nat.portmap.removal import Removal
from nat.portmap.upnp_messages import UpnpAnswer, UpnpFailed, UpnpFound, UpnpUnmapped

ANNOUNCED_SECONDS = 10.0
"""Anyone can forge a restart: at most one round of renewals in this time."""
_ANNOUNCED_DELAY_SECONDS = 2.0
"""All hosts hear one announcement; they spread their requests over this."""
_PMP_OPCODES = (0x80, 0x82)


class Phase(Enum):
    """What the mapper is doing."""

    IDLE = auto()
    SEARCHING = auto()
    MAPPING = auto()
    RESTING = auto()
    CLOSING = auto()


class PortMapper:
    """The mappings at one gateway, of one address family.

    Args:
        config: Methods and times.
        ports: What to map; at least one.
        rng: Nonces and spreading; a nonce must be unguessable, so ``SystemRandom``.
    """

    def __init__(
        self, config: PortMapConfig, ports: Sequence[WantedPort], rng: random.Random
    ) -> None:
        if not ports:
            raise ValueError("no port to map")
        self._config = config
        self._rng = rng
        self._outbox = Outbox()
        self._keeper = LeaseKeeper(config, ports, self._outbox, rng)
        self._prober = Prober(config, self._keeper, self._outbox, rng)
        self._desk = AnswerDesk(config, self._keeper, self._outbox)
        self._removal: Removal | None = None
        self._phase = Phase.IDLE
        self._finding = explain.no_gateway("")
        self._explained: Finding | None = None
        self._failures: dict[Method, str] = {}
        self._pause = config.retry_seconds
        self._retry_at = inf
        self._refresh_at = inf
        self._refreshed_at = -inf

    # -- what is the case -------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """What the mapper is doing."""
        return self._phase

    @property
    def done(self) -> bool:
        """Whether, after :meth:`close`, nothing is left to remove."""
        return self._removal is not None and self._removal.done

    @property
    def token(self) -> int:
        """The token of UPnP calls that still matter; older ones can be dropped."""
        return self._outbox.token

    def mappings(self) -> tuple[Mapping, ...]:
        """Return what the gateway forwards now."""
        return self._keeper.mappings()

    def finding(self) -> Finding:
        """Return why things are as they are."""
        return self._finding

    def take_commands(self) -> list[Command]:
        """Return what the shell has to do, once."""
        return self._outbox.take_commands()

    def take_events(self) -> list[Event]:
        """Return what happened, once."""
        self._explain()
        return self._outbox.take_events()

    # -- inputs -----------------------------------------------------------------------

    def on_network_change(
        self, gateway: Gateway | None, now: float, reason: str = ""
    ) -> None:
        """Use ``gateway`` from now on; None means there is none, for ``reason``.

        The same gateway as before is asked to confirm every mapping: a router of
        another network may have the same address.
        """
        if self._phase is Phase.CLOSING:
            return
        if gateway is not None and gateway == self._keeper.gateway:
            if self._phase is Phase.MAPPING:
                self._keeper.refresh(now, verify=True)
            elif self._phase is Phase.RESTING:
                self._begin_search(now)
            return
        self._outbox.next_network()
        self._keeper.move(gateway, "the network changed")
        self._desk.reset()
        self._pause = self._config.retry_seconds
        self._prober.winner = None
        self._rest(inf)
        if gateway is None:
            self._finding = explain.no_gateway(reason)
        elif not gateway.is_ipv6 and is_global(gateway.source):
            self._finding = explain.not_needed(gateway)
        else:
            self._begin_search(now)

    def receive_untrusted(self, data: bytes, now: float) -> None:
        """Take a datagram from the gateway's port 5351.

        Raises:
            RemoteProtocolError: malformed, or the answer to nothing we asked.
        """
        if data[:1] == b"\0" and data[1:2] and data[1] in _PMP_OPCODES:
            answer = pmp.decode_untrusted(data)
            if isinstance(answer, pmp.AddressAnswer):
                self._on_pmp_address(answer, now)
            else:
                self._on_pmp_map(answer, now)
            return
        reply = pcp.decode_untrusted(data)
        if isinstance(reply, pcp.MapAnswer):
            self._on_pcp_map(reply, now)
        elif isinstance(reply, pcp.VersionRefused):
            self._on_failure("pcp", f"the server speaks version {reply.version}", now)

    def on_announcement_untrusted(self, data: bytes, now: float) -> None:
        """Take a multicast that seems to be from the gateway: it may have restarted.

        Only a hint, because a neighbour can forge it: everything is asked for again,
        a moment later (RFC 6887 section 14.1.3) and not often.

        Raises:
            RemoteProtocolError: not an announcement of PCP or NAT-PMP.
        """
        if data[:1] == b"\0":
            pmp.decode_untrusted(data)
        elif not isinstance(pcp.decode_untrusted(data), pcp.Announcement):
            raise RemoteProtocolError("not a PCP announcement")
        if self._phase in (Phase.MAPPING, Phase.RESTING):
            self._plan_refresh(now + self._rng.uniform(0, _ANNOUNCED_DELAY_SECONDS))

    def on_unreachable(self, now: float) -> None:
        """Note that nobody listens on the gateway's port 5351 (an ICMP error)."""
        if self._phase is Phase.SEARCHING:
            for method in ("pcp", "nat-pmp"):
                self._on_failure(method, "port 5351 is closed", now)

    def on_upnp(self, token: int, answer: UpnpAnswer, now: float) -> None:
        """Take the result of a UPnP call."""
        if token != self._outbox.token:
            return
        if self._removal is not None:
            if isinstance(answer, UpnpUnmapped | UpnpFailed):
                self._removal.on_call(answer.internal_port)
            return
        if isinstance(answer, UpnpFound):
            self._keeper.upnp_url = answer.url
            self._on_success("upnp", now)
        elif isinstance(answer, UpnpFailed) and not answer.internal_port:
            self._on_failure("upnp", answer.reason, now)
        else:
            self._desk.on_upnp(answer, now)
            self._after_answer(False, now)

    def on_timeout(self, now: float) -> None:
        """Do what is due."""
        if self._removal is not None:
            self._removal.on_timeout(now)
        elif self._phase is Phase.SEARCHING:
            self._prober.on_timeout(now)
            self._judge_search(now)
        elif self._phase is Phase.MAPPING:
            if now >= self._refresh_at:
                self._refresh(now)
            self._keeper.on_timeout(now)
            self._judge_method(now)
        elif now >= min(self._retry_at, self._refresh_at):
            self._begin_search(now)

    def next_timeout(self) -> float:
        """Return when :meth:`on_timeout` is due; infinity when nothing is."""
        if self._removal is not None:
            return self._removal.next_timeout()
        if self._phase is Phase.SEARCHING:
            return self._prober.next_timeout()
        if self._phase is Phase.MAPPING:
            return min(self._refresh_at, self._keeper.next_timeout())
        return min(self._retry_at, self._refresh_at)

    def close(self, now: float) -> None:
        """Begin to remove every mapping; go on until :attr:`done`."""
        if self._removal is None:
            deadline = now + self._config.close_seconds
            self._prober.stop()
            self._phase = Phase.CLOSING
            self._outbox.next_network()  # what is in flight must not undo the removal
            self._removal = Removal(
                self._keeper, self._outbox, deadline, now, self._rng
            )
            self._keeper.lose_all("this peer is leaving")

    # -- searching --------------------------------------------------------------------

    def _begin_search(self, now: float) -> None:
        gateway = self._keeper.gateway
        assert gateway is not None, "nobody to ask"
        self._phase = Phase.SEARCHING
        self._retry_at = self._refresh_at = inf
        self._refreshed_at = now
        self._finding = explain.searching(gateway)
        self._prober.begin(self._failures, now)
        self._judge_search(now)

    def _judge_search(self, now: float) -> None:
        method = self._prober.choose(now)
        if method is not None:
            self._prober.stop()
            self._phase = Phase.MAPPING
            self._keeper.start(method, now)
            return
        failures = self._prober.failures(now)
        gateway = self._keeper.gateway
        if failures is not None and gateway is not None:
            self._finding = explain.nothing_works(
                gateway, tuple(self._keeper.leases), failures
            )
            self._rest(now + self._pause * self._rng.uniform(0.9, 1.1))
            self._pause = min(2 * self._pause, self._config.max_retry_seconds)

    def _rest(self, until: float) -> None:
        self._phase = Phase.IDLE if self._keeper.gateway is None else Phase.RESTING
        self._prober.stop()
        self._failures.clear()
        self._retry_at, self._refresh_at = until, inf

    def _on_failure(self, method: Method, reason: str, now: float) -> None:
        """Note that ``method`` cannot serve, while searching."""
        self._prober.fail(method, reason)
        self._judge_search(now)

    def _on_success(self, method: Method, now: float) -> None:
        """Note that ``method`` answers, while searching."""
        self._prober.works(method, now)
        self._judge_search(now)

    def _judge_method(self, now: float) -> None:
        """Look for another method when this one holds nothing."""
        if self._phase is Phase.MAPPING and self._keeper.failed:
            method = self._keeper.method
            assert method is not None, "mapping without a method"
            self._failures[method] = self._keeper.refusal or "it stopped answering"
            self._begin_search(now)

    # -- answers ----------------------------------------------------------------------

    def _on_pcp_map(self, answer: pcp.MapAnswer, now: float) -> None:
        self._desk.pcp_lease(answer)
        if self._removal is not None:
            self._removal.on_datagram("pcp", answer.internal_port)
        elif not self._prober.searching:
            self._after_answer(self._desk.on_pcp(answer, now), now)
        elif answer.result == pcp.Result.SUCCESS:
            self._on_success("pcp", now)
        else:
            self._on_failure("pcp", pcp.result_name(answer.result), now)

    def _on_pmp_map(self, answer: pmp.MapAnswer, now: float) -> None:
        self._desk.pmp_lease(answer)
        if self._removal is not None:
            self._removal.on_datagram("nat-pmp", answer.internal_port)
        elif not self._prober.searching:
            self._after_answer(self._desk.on_pmp(answer, now), now)

    def _on_pmp_address(self, answer: pmp.AddressAnswer, now: float) -> None:
        if self._removal is not None:
            return
        if not self._prober.searching and self._keeper.method != "nat-pmp":
            return
        if answer.result != pmp.Result.SUCCESS:
            reason = pmp.result_name(answer.result)
            self._on_failure("nat-pmp", reason, now)
        elif not is_assignable(answer.external_ip):
            self._on_failure("nat-pmp", "the router has no external address", now)
        else:
            self._keeper.on_external_ip(answer.external_ip, now)
            self._on_success("nat-pmp", now)

    def _after_answer(self, forgot: bool, now: float) -> None:
        if self._keeper.mappings():
            self._pause = self._config.retry_seconds
            self._failures.clear()
        if forgot:
            self._plan_refresh(now)
        self._judge_method(now)

    # -- keeping ----------------------------------------------------------------------

    def _plan_refresh(self, at: float) -> None:
        at = max(at, self._refreshed_at + ANNOUNCED_SECONDS)
        self._refresh_at = min(self._refresh_at, at)

    def _refresh(self, now: float) -> None:
        self._refresh_at, self._refreshed_at = inf, now
        self._keeper.refresh(now)

    def _explain(self) -> None:
        """Emit the finding if it is another one than before."""
        mappings, wanted = self._keeper.mappings(), len(self._keeper.leases)
        refusal = self._keeper.refusal
        settled = len(mappings) == wanted or refusal  # else the rest is on its way
        if mappings and settled and self._phase is Phase.MAPPING:
            self._finding = explain.held(mappings, wanted, refusal)
        if self._finding != self._explained:
            self._explained = self._finding
            self._outbox.emit(Explained(self._finding))
