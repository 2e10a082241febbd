"""Offers of data-plane connections: the messages, and the table of open labels.

    dialler                                  acceptor
    OfferRequest(purpose, certificate)  ->
                                        <-   OfferGranted(label, certificate, addresses)
                                             or OfferRefused
    TCP connect, 16-byte label          ->   label names peer, purpose, certificate
    TLS 1.3, each trusting only the certificate in the offer (fabric/bulk/tls.py)

The first two lines run on a control stream, which is authenticated: the label and the
certificates are bound to the two peer ids. A label works once and for 30 s. It is sent
in the clear: who copies it can at most spend it, because TLS follows.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import msgspec

from fabric.bulk.certificates import MAX_CERTIFICATE_BYTES, Credentials
from fabric.core.codec import Codec
from fabric.core.errors import (
    ConfigError,
    FabricError,
    RemoteProtocolError,
    RemoteRefused,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import PeerId

LABEL_BYTES = 16
"""Random, so that nobody guesses an open label."""
OBSERVE_LABEL = b"fabric-observe/1"
"""Says "tell me where I come from": the listener answers one frame, "ip:port".

A NAT maps each local port on its own, so the one about to be punched must ask by
itself. Like STUN over TCP (RFC 8489) the answer is not authenticated: a wrong one makes
a punch fail and nothing else.
"""
MULTISTREAM_BYTE = 0x13
"""First byte of whatever speaks the control plane's protocol: the length of
"/multistream/1.0.0" and its newline. No label begins with it, so one byte tells the two
apart where both planes share a port."""
MAX_ADDRESSES = 16
"""Addresses in one offer; the dialler tries all of them at once."""

_Name = Annotated[str, msgspec.Meta(max_length=64)]
_Text = Annotated[str, msgspec.Meta(max_length=500)]
_Certificate = Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]


class ForRpc(msgspec.Struct, frozen=True, tag="rpc"):
    """The pair's multiplexed RPC connection."""


class ForBulk(msgspec.Struct, frozen=True, tag="bulk"):
    """A bulk connection to a daemon's ``service``."""

    service: _Name


class ForJob(msgspec.Struct, frozen=True, tag="job"):
    """A connection to the worker of ``job``; see ``paths_api.Purpose``."""

    job: _Name
    counter: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    channel: _Name


class ForControl(msgspec.Struct, frozen=True, tag="control"):
    """A control connection on a path that the control port did not find."""


OfferPurpose = ForRpc | ForBulk | ForJob | ForControl


class OfferRequest(msgspec.Struct, frozen=True, tag="request"):
    """Ask for a connection; ``certificate`` is what the dialler will show."""

    purpose: OfferPurpose
    certificate: _Certificate


class OfferGranted(msgspec.Struct, frozen=True, tag="granted"):
    """Connect to any of ``addresses`` ("ip:port"), send ``label``, then TLS.

    ``shared`` are ports of the control plane that take labels too: second choice, for
    sites that let out one port only and routers that forward one.
    """

    label: Annotated[
        bytes, msgspec.Meta(min_length=LABEL_BYTES, max_length=LABEL_BYTES)
    ]
    certificate: _Certificate
    addresses: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=MAX_ADDRESSES)]
    shared: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=MAX_ADDRESSES)] = ()


class OfferRefused(msgspec.Struct, frozen=True, tag="refused"):
    """No connection; ``transient`` when another time it may be different."""

    code: _Name
    reason: _Text
    next_step: _Text = ""
    transient: bool = False

    @classmethod
    def of(cls, error: FabricError) -> OfferRefused:
        """Return the refusal that tells the dialler about ``error``."""
        return cls(
            error.code[:64],
            error.reason[:500],
            error.next_step[:500],
            isinstance(error, Unavailable | ResourceExhausted),
        )

    def as_error(self) -> FabricError:
        """Return what the dialler raises."""
        kind = Unavailable if self.transient else RemoteRefused
        return kind(self.reason, code=self.code, next_step=self.next_step)


OFFER_REQUEST: Codec[OfferRequest] = Codec(OfferRequest, max_bytes=8192)
OFFER_REPLY: Codec[OfferGranted | OfferRefused] = Codec(
    OfferGranted | OfferRefused, max_bytes=8192
)


@dataclass(frozen=True)
class Offer:
    """A label's meaning on the accepting side.

    Attributes:
        peer: Who may use it.
        purpose: What for.
        peer_certificate: The only certificate its TLS handshake trusts.
        ours: What we show, or None when a worker holds the key.
    """

    peer: PeerId
    purpose: OfferPurpose
    peer_certificate: bytes
    ours: Credentials | None


class OfferTable:
    """Open labels of the accepting side, bounded in number and in time.

    Args:
        life_seconds: A label is void afterwards.
        max_offers: Labels in all.
        max_per_peer: Labels of one peer.
    """

    def __init__(
        self, *, life_seconds: float, max_offers: int, max_per_peer: int
    ) -> None:
        self._life = life_seconds
        self._max_offers = max_offers
        self._max_per_peer = max_per_peer
        self._open: dict[bytes, tuple[float, Offer]] = {}  # oldest first
        self._count: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, label: bytes) -> bool:
        return label in self._open

    def add(self, label: bytes, offer: Offer, now: float) -> None:
        """Open ``label`` for ``offer``.

        Raises:
            ResourceExhausted: too many labels are open, in all or of this peer.
        """
        self._expire(now)
        if self._count[offer.peer] >= self._max_per_peer:
            raise ResourceExhausted(
                f"{self._max_per_peer} offers to this peer are open", code="E_BUSY"
            )
        if len(self._open) >= self._max_offers:
            raise ResourceExhausted(
                f"{self._max_offers} offers are open", code="E_BUSY"
            )
        self._open[label] = (now + self._life, offer)
        self._count[offer.peer] += 1

    def redeem(self, label: bytes, now: float) -> Offer:
        """Return and close the offer of ``label``.

        Raises:
            RemoteProtocolError: the label is unknown, used or expired.
        """
        self._expire(now)
        if label not in self._open:
            raise RemoteProtocolError("label is unknown, used or expired")
        return self._close(label)

    def forget(self, peer: PeerId) -> None:
        """Void every label of ``peer``."""
        for label in [k for k, (_, o) in self._open.items() if o.peer == peer]:
            self._close(label)

    def _expire(self, now: float) -> None:
        while self._open:
            label = next(iter(self._open))
            if self._open[label][0] > now:
                return
            self._close(label)

    def _close(self, label: bytes) -> Offer:
        offer = self._open.pop(label)[1]
        self._count[offer.peer] -= 1
        if not self._count[offer.peer]:
            del self._count[offer.peer]
        return offer


def parse_address_untrusted(text: str) -> tuple[str, int]:
    """Return (IP, port) of "ip:port" or "[ip]:port"; names are not looked up.

    Raises:
        RemoteProtocolError: not of this form.
    """
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError as exc:
        raise RemoteProtocolError(f"address {text!r}: {exc}") from exc
    if not (port.isascii() and port.isdigit() and len(port) <= 5):
        raise RemoteProtocolError(f"address {text!r} has no port")
    if int(port) > 65535:
        raise RemoteProtocolError(f"address {text!r} has port {port}")
    return str(address), int(port)


def parse_listen(text: str) -> tuple[tuple[str, int], ...]:
    """Return each (IP, port) of the operator's ``listen`` setting; port 0 is any.

    An empty one listens on loopback.

    Raises:
        ConfigError: not "ip:port", or several with commas between.
    """
    try:
        parts = (text or "127.0.0.1:0").split(",")
        return tuple(parse_address_untrusted(part.strip()) for part in parts)
    except RemoteProtocolError as exc:
        raise ConfigError(
            f"data.listen: {exc.reason}",
            next_step='use "IP:PORT", as in "0.0.0.0:0" or "0.0.0.0:0,[::]:0"',
        ) from exc


def format_address(host: str, port: int) -> str:
    """Return "ip:port", or "[ip]:port" for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def new_label() -> bytes:
    """Return a label that nobody guesses and that no other protocol begins with."""
    while (label := secrets.token_bytes(LABEL_BYTES))[0] == MULTISTREAM_BYTE:
        pass
    return label


def endpoint_of_multiaddr(text: str) -> str | None:
    """Return "ip:port" of a direct "/ip4/1.2.3.4/tcp/5/..." multiaddr, or None."""
    ip, parts = ip_of_multiaddr(text), text.split("/")
    if ip is None or len(parts) < 5 or parts[3] != "tcp" or not parts[4].isdigit():
        return None
    return format_address(ip, int(parts[4]))


def ip_of_multiaddr(text: str) -> str | None:
    """Return the IP of a direct "/ip4/1.2.3.4/..." multiaddr, or None."""
    parts = text.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6") or "p2p-circuit" in parts:
        return None
    return parts[2]
