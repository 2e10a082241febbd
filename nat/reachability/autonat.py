"""AutoNAT without sockets: what a server dials for whom, what a client believes.

Server (v2): the first address of the request that it is willing to dial, and no other.
An address whose IP is not the asker's own costs the asker dial data first, so that
nobody gains from having us dial a victim. Never an address that does not reach as far
as the asker: loopback and private addresses only for an asker that is seen there.

Client: each request carries one address and a fresh nonce. An address counts as reached
when the server says so *and* the nonce came in on a connection that somebody dialled.
A server that says so without the nonce is lying or lost it: no verdict.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

import msgspec

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId
from nat.addresses import AddressClass, classify, endpoint_of, parse_ip
from nat.reachability.autonat_limits import RequestLimits
from nat.reachability.autonat_messages import (
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialStatus,
    DialV1,
    ResponseStatus,
    ResponseV1,
    StatusV1,
)
from nat.reachability.config import AutonatConfig

MIN_DATA_BYTES, MAX_DATA_BYTES = 30_000, 100_000
"""What servers ask for (v2, "Amplification Attack Prevention")."""
MAX_PENDING = 64
"""Nonces that wait for their dial-back: 5 servers, 8 addresses each."""
NONCE_SECONDS = 60.0
_NO_TARGET = frozenset({AddressClass.MULTICAST, AddressClass.UNUSABLE})


class Target(msgspec.Struct, frozen=True):
    """What a server decided to dial.

    Attributes:
        index: Position in the request.
        ip: Address.
        port: TCP port.
        data_bytes: Dial data to ask for first; 0 for none.
    """

    index: int
    ip: str
    port: int
    data_bytes: int = 0


class AddressVerdict(msgspec.Struct, frozen=True):
    """What one server found about one address.

    Attributes:
        address: The multiaddr.
        reached: Whether a dial from outside arrived; None when nothing was learnt.
        reason: For people.
        proven: Whether a nonce proved it (never with v1).
    """

    address: str
    reached: bool | None
    reason: str
    proven: bool = False


class AutonatServer:
    """Decides about requests.

    Args:
        config: Limits.
        randrange: As :func:`random.randrange`, of an unpredictable source.
    """

    def __init__(
        self, config: AutonatConfig, randrange: Callable[[int, int], int]
    ) -> None:
        self._limits = RequestLimits(config.per_peer_minute, config.total_minute)
        self._data_limits = RequestLimits(config.per_peer_minute, config.data_minute)
        self._randrange = randrange

    def admit(self, peer: PeerId, ip: str, now: float) -> bool:
        """Return whether this request is served; limits hold per peer and per IP."""
        return self._limits.admit((peer, _network(ip)), now)

    def choose(self, request: DialRequest, asker_ip: str, now: float) -> Target | None:
        """Return what to dial for a v2 request, or None to refuse."""
        for index, addr in enumerate(request.addrs):
            end = endpoint_of(addr) if addr else None
            if end is None or not _may_dial(str(end[0]), asker_ip):
                continue
            ip, port = str(end[0]), end[1]
            if ip == asker_ip:
                return Target(index, ip, port)
            if not self._data_limits.admit((_network(asker_ip),), now):
                return None
            size = self._randrange(MIN_DATA_BYTES, MAX_DATA_BYTES)
            return Target(index, ip, port, size)
        return None

    def choose_v1(self, request: DialV1, asker: PeerId, asker_ip: str) -> list[Target]:
        """Return what to dial for a v1 request: addresses of the asker's IP alone."""
        if request.peer != asker:
            return []
        targets = []
        for index, addr in enumerate(request.addrs):
            end = endpoint_of(addr) if addr else None
            if end and str(end[0]) == asker_ip and _may_dial(asker_ip, asker_ip):
                targets.append(Target(index, asker_ip, end[1]))
        return targets[:MAX_V1_TARGETS]


def _network(ip: str) -> str:
    """Return what one asker holds: an IPv4 address, or a /64 of IPv6 addresses."""
    parsed = parse_ip(ip)
    if parsed is None or parsed.version == 4:
        return ip
    return str(ipaddress.ip_network(f"{parsed}/64", strict=False))


MAX_V1_TARGETS = 3
"""Ports of its IP that one v1 request can have dialled."""


def _may_dial(ip: str, asker_ip: str) -> bool:
    kind = classify(ip)
    if kind in _NO_TARGET:
        return False
    if kind is AddressClass.PUBLIC:
        return True
    if kind is AddressClass.LOOPBACK:
        return classify(asker_ip) is kind
    # a neighbour may ask about itself; to scan the site with our help it may not
    return ip == asker_ip


class AutonatClient:
    """Keeps the nonces under way and judges answers.

    Args:
        randbits: As :func:`random.getrandbits`, of an unpredictable source.
    """

    def __init__(self, randbits: Callable[[int], int]) -> None:
        self._randbits = randbits
        self._pending: dict[int, float] = {}
        self._arrived: set[int] = set()

    def request(self, addresses: Sequence[str], now: float) -> DialRequest | None:
        """Return a request with a fresh nonce; None when too many are under way."""
        for nonce, since in tuple(self._pending.items()):
            if now - since > NONCE_SECONDS:
                self.finish(nonce)
        if len(self._pending) >= MAX_PENDING:
            return None
        nonce = self._randbits(64)
        self._pending[nonce] = now
        return DialRequest(tuple(addresses), nonce)

    def on_dial_back(self, nonce: int, *, dialled_in: bool) -> bool:
        """Note a dial-back; return whether it counts.

        Args:
            nonce: What it said.
            dialled_in: Whether it came on a connection that the other end dialled: on
                one of ours it would prove nothing.
        """
        if nonce not in self._pending or not dialled_in:
            return False
        self._arrived.add(nonce)
        return True

    def finish(self, nonce: int) -> None:
        """Forget ``nonce``; a dial-back that comes later does not count."""
        self._pending.pop(nonce, None)
        self._arrived.discard(nonce)

    def data_bytes(self, request: DialRequest, ask: DialDataRequest) -> int:
        """Return how many bytes of dial data to send.

        Raises:
            RemoteProtocolError: more than any server may ask for, or for no address.
        """
        if ask.index >= len(request.addrs):
            raise RemoteProtocolError(f"AutoNAT: no address {ask.index}")
        if ask.num_bytes > MAX_DATA_BYTES:
            raise RemoteProtocolError(f"AutoNAT: {ask.num_bytes} B of dial data")
        return ask.num_bytes

    def judge(self, request: DialRequest, response: DialResponse) -> AddressVerdict:
        """Return what ``response`` proves.

        Raises:
            RemoteProtocolError: it is about an address that was not asked about.
        """
        first = request.addrs[0] or ""
        if response.status is not ResponseStatus.OK:
            return AddressVerdict(first, None, response.status.name)
        if response.index >= len(request.addrs):
            raise RemoteProtocolError(f"AutoNAT: no address {response.index}")
        address = request.addrs[response.index] or ""
        arrived = request.nonce in self._arrived
        if response.dial is DialStatus.OK and arrived:
            return AddressVerdict(address, True, "the dial-back arrived", proven=True)
        if response.dial is DialStatus.OK:
            return AddressVerdict(address, None, "claimed, but no dial-back arrived")
        if response.dial is DialStatus.E_DIAL_ERROR and not arrived:
            return AddressVerdict(address, False, "no connection from outside")
        return AddressVerdict(address, None, f"{response.dial.name}, contradictory")


def judge_v1(
    addresses: Sequence[str], response: ResponseV1, own_ip: str
) -> tuple[AddressVerdict, ...]:
    """Return what a v1 server's word means for each of ``addresses``.

    It dialled those of the IP that it saw us at, ``own_ip``, and no others.
    """
    if response.status is StatusV1.OK:
        reached = response.addr
        return tuple(
            AddressVerdict(addr, True, "a v1 server says so")
            for addr in addresses
            if reached is not None and endpoint_of(addr) == endpoint_of(reached)
        )
    if response.status is not StatusV1.E_DIAL_ERROR:
        name = response.status.name
        return tuple(AddressVerdict(addr, None, name) for addr in addresses)
    return tuple(
        AddressVerdict(addr, False, "no connection from outside")
        for addr in addresses
        if (end := endpoint_of(addr)) is not None and str(end[0]) == own_ip
    )
