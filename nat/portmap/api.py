"""What port mapping tells: mappings, events, and one finding that explains them."""

from __future__ import annotations

import ipaddress
from typing import Literal

import msgspec

from nat.portmap.config import Method

Level = Literal["ok", "warn"]


class Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the router that leads to one of ours, as the router says.

    The address is a claim: a router behind another one, or a lying neighbour, names an
    address that nobody reaches. It becomes a candidate, and reachability is what a
    dial-back proves.

    Attributes:
        internal_port: Our port.
        external_ip: The router's address, as it says.
        external_port: The router's port.
        method: What granted it.
        lease_seconds: How long the router keeps it without renewal.
    """

    internal_port: int
    external_ip: str
    external_port: int
    method: Method
    lease_seconds: int

    @property
    def is_public(self) -> bool:
        """Whether the address is a global one: not private, shared or reserved."""
        return is_global(self.external_ip)


class Mapped(msgspec.Struct, frozen=True, tag="mapped"):
    """A mapping exists now; one with other external facts was Lost before."""

    mapping: Mapping


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """A mapping is gone: withdraw its address."""

    mapping: Mapping
    reason: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Why things are as they are, for status and doctor.

    Attributes:
        code: Stable name.
        level: Whether a person should care.
        reason: What is the case, with the facts.
        next_step: What to do about it, or "".
    """

    code: str
    level: Level
    reason: str
    next_step: str = ""


class Explained(msgspec.Struct, frozen=True, tag="explained"):
    """The finding changed."""

    finding: Finding


Event = Mapped | Lost | Explained


def is_global(address: str) -> bool:
    """Return whether ``address`` can be reached from everywhere, by its class."""
    return ipaddress.ip_address(address).is_global


def is_assignable(address: str) -> bool:
    """Return whether a router can have ``address`` on its outer side."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (
        ip.is_unspecified or ip.is_loopback or ip.is_multicast or ip.is_link_local
    )
