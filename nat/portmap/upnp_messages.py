"""What the port mapper asks of a UPnP gateway and what it hears back.

The same records cross the pipe to the process that speaks UPnP
(``upnp_worker.py``); their strings are bounded, for it parses what a router sends.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Address = Annotated[str, Meta(max_length=64)]
Url = Annotated[str, Meta(max_length=512)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Reason = Annotated[str, Meta(max_length=256)]

MAX_MESSAGE_BYTES = 4096


class UpnpSearch(msgspec.Struct, frozen=True, tag="search", kw_only=True):
    """Find the gateway's description and its external address."""

    gateway: Address
    source: Address


class UpnpMap(msgspec.Struct, frozen=True, tag="map", kw_only=True):
    """Map a TCP port, or renew the mapping."""

    gateway: Address
    source: Address
    url: Url
    internal_port: Port
    external_port: Port
    lease_seconds: int


class UpnpUnmap(msgspec.Struct, frozen=True, tag="unmap", kw_only=True):
    """Remove a mapping, if it still leads to us."""

    gateway: Address
    source: Address
    url: Url
    internal_port: Port
    external_port: Port


UpnpRequest = UpnpSearch | UpnpMap | UpnpUnmap


class UpnpFound(msgspec.Struct, frozen=True, tag="found", kw_only=True):
    """The gateway is an Internet Gateway Device."""

    url: Url
    external_ip: Address


class UpnpMapped(msgspec.Struct, frozen=True, tag="mapped", kw_only=True):
    """The mapping was made; a lease of 0 has no end."""

    internal_port: Port
    external_port: Port
    external_ip: Address
    lease_seconds: int


class UpnpUnmapped(msgspec.Struct, frozen=True, tag="unmapped", kw_only=True):
    """The mapping is gone."""

    internal_port: Port


class UpnpConflict(msgspec.Struct, frozen=True, tag="conflict", kw_only=True):
    """Another host has that external port (error 718)."""

    internal_port: Port
    external_port: Port


class UpnpFailed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """The request came to nothing; ``internal_port`` 0 is the search."""

    internal_port: Port = 0
    reason: Reason


UpnpAnswer = UpnpFound | UpnpMapped | UpnpUnmapped | UpnpConflict | UpnpFailed
