"""What the doctor is told: plain facts, each optional, because any may be unmeasured.

None means "not measured" and becomes a line that says so; it is never taken for good
news. Whoever collects them (``fabric/app/diagnose.py``) judges nothing.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["public", "private", "unknown"]
Confidence = Literal["none", "low", "medium", "high"]
Scope = Literal["internet", "site", "host"]
"""How far those are who were asked whether they reach us."""
MappingKind = Literal["none", "endpoint_independent", "per_destination", "unknown"]
"""RFC 4787 section 4.1; "none": no NAT in between."""


class Refusal(msgspec.Struct, frozen=True):
    """Why something is not so; the fields of a FabricError."""

    code: str
    reason: str
    next_step: str = ""


class Dialled(msgspec.Struct, frozen=True):
    """One address and what a TCP dial of it now came to.

    Attributes:
        addr: "ip:port", or "via RELAY".
        error: "" if it answered, else why not.
        source: Who says that the peer is there; "" when nobody has to.
        dialled: False for an address that was only heard of.
    """

    addr: str
    error: str = ""
    source: str = ""
    dialled: bool = True


class Listening(msgspec.Struct, frozen=True, kw_only=True):
    """Where we listen, and whether our own machine lets us in there.

    Attributes:
        control: "ip:port" of the control plane.
        data: "ip:port" of the data plane.
        dialled: Our LAN addresses, dialled from here.
        has_rules: Whether a packet filter holds rules; None when not readable.
    """

    control: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    dialled: tuple[Dialled, ...] = ()
    has_rules: bool | None = None

    @property
    def only_loopback(self) -> bool:
        """Whether nobody outside this machine can dial us."""
        return bool(self.control) and all(
            addr.startswith(("127.", "[::1]")) for addr in self.control
        )


class ClockSample(msgspec.Struct, frozen=True):
    """A peer's clock less ours, give or take half a round trip."""

    peer: str
    skew_seconds: float
    error_seconds: float = 0.0


class Reachability(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on our own address, and what our NAT does.

    Attributes:
        verdict: Whether unsolicited connections from anywhere in ``scope`` arrive.
        confidence: By how many agree.
        scope: How far whoever was asked is.
        mapping: What observers say about our one port.
        sequential: A per-destination mapping that counts ports up.
        external: Our address as the others see it, or "".
        num_observers: Whose word this is.
        reason: In words, as whoever decided it puts it.
    """

    verdict: Verdict = "unknown"
    confidence: Confidence = "none"
    scope: Scope = "internet"
    mapping: MappingKind = "unknown"
    sequential: bool = False
    external: str = ""
    num_observers: int = 0
    reason: str = ""

    @property
    def open_to_the_internet(self) -> bool:
        """Whether everybody reaches us, not only those near by."""
        return self.verdict == "public" and self.scope == "internet"


class PortMapping(msgspec.Struct, frozen=True, kw_only=True):
    """What the router grants.

    Attributes:
        mapped: "ip:port" of the router that lead to us.
        method: "upnp", "nat-pmp" or "pcp"; "" when none.
        public: Whether a mapped address is a global one.
        needless: Our own address is public.
        refusal: Why there is none.
    """

    mapped: tuple[str, ...] = ()
    method: str = ""
    public: bool = True
    needless: bool = False
    refusal: Refusal | None = None


class Reservation(msgspec.Struct, frozen=True):
    """A slot that a relay keeps for us."""

    relay: str
    rtt_seconds: float | None = None
    expires_in_seconds: float = 0.0


class Relays(msgspec.Struct, frozen=True, kw_only=True):
    """Our reservations and what the other relays said."""

    held: tuple[Reservation, ...] = ()
    wanted: int = 2
    refused: tuple[tuple[str, Refusal], ...] = ()


class Relaying(msgspec.Struct, frozen=True, kw_only=True):
    """What we do for others.

    Attributes:
        active: Whether new reservations are accepted.
        volunteer: The setting ``nat.relay.volunteer``.
        reservations: Peers that may be reached through us.
        circuits: What is carried now.
        max_bytes_per_second: Budget of all circuits together.
    """

    active: bool
    volunteer: str = "auto"
    reservations: int = 0
    circuits: int = 0
    max_bytes_per_second: float = 0.0


class PathMtu(msgspec.Struct, frozen=True):
    """What the kernel knows of the route to a peer's address.

    Attributes:
        peer: Its name.
        mtu_bytes: Largest packet on that route.
        mss_bytes: Largest segment of a connection there; 0 when none was made.
    """

    peer: str
    mtu_bytes: int
    mss_bytes: int = 0


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A measured link; bandwidth in bytes per second, 0 when not measured."""

    peer: str
    path: str = "direct"
    rtt_seconds: float | None = None
    up: float = 0.0
    down: float = 0.0


class Members(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh as we see it, without ourselves.

    Attributes:
        known: Members in the replicated state.
        connected: Those with a live connection.
        stale: Those whose record ran out: gone, or in another island.
        on_demand: Those that are there and connected when needed: no neighbours.
    """

    known: tuple[str, ...] = ()
    connected: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    on_demand: tuple[str, ...] = ()

    @property
    def away(self) -> tuple[str, ...]:
        """Members that should be connected and are not."""
        fine = {*self.connected, *self.stale, *self.on_demand}
        return tuple(sorted(set(self.known) - fine))


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh as rendezvous points see it, and how it stands with these.

    Attributes:
        sentence: Whoever looked, in words.
        registered: Points that know us.
        failed: The others in use, and why not.
        unconnected: Members whom they know and we are not connected with.
    """

    sentence: str = ""
    registered: int = 0
    failed: tuple[tuple[str, str], ...] = ()
    unconnected: tuple[str, ...] = ()


class Mdns(msgspec.Struct, frozen=True, kw_only=True):
    """How it stands with finding peers on the local network."""

    state: Literal["off", "idle", "starting", "announcing", "failed"]
    reason: str = ""
    next_step: str = ""
    heard: int = 0


class Remembered(msgspec.Struct, frozen=True, kw_only=True):
    """The file of peers that a restart starts from."""

    peers: int = 0
    problem: Refusal | None = None


class Punched(msgspec.Struct, frozen=True, kw_only=True):
    """The last hole punch with a peer; ``refusal`` is None if it worked.

    Attributes:
        seconds: What it took, or until it was given up.
        endpoints: "ip:port" that were dialled.
        attempts: Dials in all; 0 when nobody counted.
        age_seconds: Since it ended.
        refusal: Why it failed.
    """

    seconds: float = 0.0
    endpoints: tuple[str, ...] = ()
    attempts: int = 0
    age_seconds: float = 0.0
    refusal: Refusal | None = None


class CircuitTried(msgspec.Struct, frozen=True):
    """One relay on the way to a peer, and why it did not carry us, or None.

    Attributes:
        relay: Its short id.
        refusal: What it, or the peer behind it, said.
        seconds: What the attempt took.
        age_seconds: Since it ended.
    """

    relay: str
    refusal: Refusal | None = None
    seconds: float = 0.0
    age_seconds: float = 0.0


class PeerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The whole chain towards one peer.

    Attributes:
        peer: Its name or short id.
        not_member: Why the mesh does not know it as a member, or None.
        addresses: Where it may be, each dialled now; None when not collected.
        gate: Why our gate refuses it, or None.
        admission: State of its admission ("trusted", "challenged", ...).
        admission_reason: In words.
        connected: Whether an RPC connection is up.
        path: "direct", "punched" or "relay" when connected.
        rtt_seconds: Of that connection.
        last_error: Why the last dial or admission failed.
        retry_in_seconds: Until the next dial.
        circuits: Relays that were tried lately; None when there is no relay client.
        punched: The last hole punch, or None.
        nat: What the peer says about its NAT, or None.
        on_demand: Not connected, because it is no neighbour and nobody needs it.
    """

    peer: str
    not_member: Refusal | None = None
    addresses: tuple[Dialled, ...] | None = None
    gate: Refusal | None = None
    admission: str = "unknown"
    admission_reason: str = ""
    connected: bool = False
    path: str = ""
    rtt_seconds: float | None = None
    last_error: Refusal | None = None
    retry_in_seconds: float = 0.0
    circuits: tuple[CircuitTried, ...] | None = None
    punched: Punched | None = None
    nat: Reachability | None = None
    on_demand: bool = False


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the doctor may know; None for what was not measured.

    Attributes:
        udp: "answered": a peer's machine answered a UDP datagram (if only with "port
            unreachable"); "blocked": our own machine did not let it out; "silent".
        ipv6: Our global IPv6 addresses.
        versions: Version by member.
        bootstraps: Addresses of the invite, dialled now.
    """

    own_version: str = ""
    listening: Listening | None = None
    clocks: tuple[ClockSample, ...] | None = None
    reachability: Reachability | None = None
    port_mapping: PortMapping | None = None
    relays: Relays | None = None
    relaying: Relaying | None = None
    udp: Literal["answered", "blocked", "silent"] | None = None
    ipv6: tuple[str, ...] | None = None
    mtus: tuple[PathMtu, ...] | None = None
    links: tuple[Link, ...] | None = None
    versions: dict[str, str] | None = None
    bootstraps: tuple[Dialled, ...] | None = None
    members: Members | None = None
    rendezvous: Rendezvous | None = None
    mdns: Mdns | None = None
    remembered: Remembered | None = None
    peer: PeerFacts | None = None
