"""Speak UPnP to the gateway: one request from standard input, one answer to output.

A process of its own, because miniupnpc blocks, reads an answer of any length into
memory and waits as long as a byte comes every five seconds: here memory and time are
bounded, the parser of a router's XML shares no address space with the identity key, and
the parent can end it. Nothing is fetched from any host but the gateway.

Source: UPnP Forum, WANIPConnection:2; error 718 is a conflict, 725 means that the
router knows permanent mappings only.
"""

from __future__ import annotations

import importlib
import resource
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Protocol, cast

from fabric.core.codec import Codec
from fabric.core.errors import FabricError, NoRoute, RemoteProtocolError
from nat.portmap.upnp_messages import (
    MAX_MESSAGE_BYTES,
    UpnpAnswer,
    UpnpConflict,
    UpnpFailed,
    UpnpFound,
    UpnpMap,
    UpnpMapped,
    UpnpRequest,
    UpnpSearch,
    UpnpUnmap,
    UpnpUnmapped,
)
from nat.portmap.upnp_ssdp import (
    MAX_BYTES,
    MULTICAST,
    PORT,
    TARGETS,
    check_url_untrusted,
    decode_location_untrusted,
    encode_search,
)

SEARCH_SECONDS = 2.5
"""A device may wait one second (MX) before it answers; a lost search is repeated."""
_REPEAT_SECONDS = 1.0
_MEMORY_BYTES = 512 << 20
_LIFE_SECONDS = 30
DESCRIPTION = "peerfabric"
_CONFLICT, _PERMANENT = "ConflictInMappingEntry", "OnlyPermanentLeasesSupported"

REQUESTS: Codec[UpnpRequest] = Codec(UpnpRequest, max_bytes=MAX_MESSAGE_BYTES)
ANSWERS: Codec[UpnpAnswer] = Codec(UpnpAnswer, max_bytes=MAX_MESSAGE_BYTES)


class Device(Protocol):
    """What is used of ``miniupnpc.UPnP``; every method raises a plain Exception."""

    lanaddr: str

    def selectigd(self, url: str) -> str:
        """Read the description; return the control URL."""
        ...

    def externalipaddress(self) -> str:
        """Return the external address."""
        ...

    def getspecificportmapping(
        self, port: int, protocol: str
    ) -> tuple[str, int, str, bool, int] | None:
        """Return client, port, description, enabled and lease of a mapping."""
        ...

    def addportmapping(
        self,
        port: int,
        protocol: str,
        client: str,
        internal: int,
        description: str,
        remote: str,
        lease: int,
    ) -> bool:
        """Add or renew a mapping."""
        ...

    def deleteportmapping(self, port: int, protocol: str) -> bool:
        """Delete a mapping."""
        ...


def perform(request: UpnpRequest) -> UpnpAnswer:
    """Do what is asked; failures are answers."""
    port = 0 if isinstance(request, UpnpSearch) else request.internal_port
    try:
        if isinstance(request, UpnpSearch):
            url = find_description(request.gateway, request.source)
            device = _open(url, request.gateway)
            return UpnpFound(url=url, external_ip=device.externalipaddress())
        device = _reopen(request)
        if isinstance(request, UpnpMap):
            return _map(device, request)
        return _unmap(device, request)
    except FabricError as exc:
        return UpnpFailed(internal_port=port, reason=exc.reason[:256])
    except Exception as exc:  # noqa: BLE001 - the library raises nothing narrower
        return UpnpFailed(internal_port=port, reason=str(exc)[:256])


def find_description(gateway: str, source: str) -> str:
    """Return the URL at which ``gateway`` describes itself.

    Asked by multicast and directly, for the sake of switches that lose multicast.

    Raises:
        NoRoute: nobody, or only others, answered.
    """
    now = time.monotonic()
    deadline, repeat_at = now + SEARCH_SECONDS, now
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        interface = socket.inet_aton(source)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)
        while now < deadline:
            if now >= repeat_at:
                repeat_at = now + _REPEAT_SECONDS
                for address in (MULTICAST, (gateway, PORT)):
                    with suppress(OSError):  # one of the two may have no route
                        for target in TARGETS:
                            sock.sendto(encode_search(target), address)
            ready, _, _ = select.select([sock], [], [], min(repeat_at, deadline) - now)
            now = time.monotonic()
            if not ready:
                continue
            try:
                data, sender = sock.recvfrom(MAX_BYTES + 1)
                if sender[0] == gateway:
                    return decode_location_untrusted(data, gateway)
            except (RemoteProtocolError, OSError):
                continue  # OSError: the gateway's port 1900 is closed
    raise NoRoute("no answer to the search")


def _open(url: str, gateway: str) -> Device:
    """Return the device that ``url`` describes.

    Raises:
        RemoteProtocolError: it wants to be controlled elsewhere.
    """
    device = cast(Device, importlib.import_module("miniupnpc").UPnP())
    check_url_untrusted(device.selectigd(url), gateway)
    return device


def _reopen(request: UpnpMap | UpnpUnmap) -> Device:
    """Return the device, which may have another URL since it restarted."""
    try:
        return _open(request.url, request.gateway)
    except Exception:  # noqa: BLE001 - the library raises nothing narrower
        url = find_description(request.gateway, request.source)
        return _open(url, request.gateway)


def _map(device: Device, request: UpnpMap) -> UpnpAnswer:
    external, internal = request.external_port, request.internal_port
    conflict = UpnpConflict(internal_port=internal, external_port=external)
    # some routers give a port to the last who asks: never take another host's
    if _holder(device, external) not in (None, (device.lanaddr, internal)):
        return conflict
    lease = request.lease_seconds
    try:
        _add(device, external, internal, lease)
    except Exception as exc:  # the text is all that the library tells
        if str(exc) == _CONFLICT:
            return conflict
        if str(exc) != _PERMANENT:
            raise
        lease = 0
        _add(device, external, internal, lease)
    return UpnpMapped(
        internal_port=internal,
        external_port=external,
        external_ip=device.externalipaddress(),
        lease_seconds=lease,
    )


def _add(device: Device, external: int, internal: int, lease: int) -> None:
    device.addportmapping(
        external, "TCP", device.lanaddr, internal, DESCRIPTION, "", lease
    )


def _unmap(device: Device, request: UpnpUnmap) -> UpnpAnswer:
    ours = (device.lanaddr, request.internal_port)
    # some routers look nothing up: a port that we asked for and nobody has is ours
    if _holder(device, request.external_port) in (None, ours):
        device.deleteportmapping(request.external_port, "TCP")
    return UpnpUnmapped(internal_port=request.internal_port)


def _holder(device: Device, external_port: int) -> tuple[str, int] | None:
    entry = device.getspecificportmapping(external_port, "TCP")
    return entry[:2] if entry else None


def main() -> None:
    """Answer one request within fixed memory and time."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.alarm(_LIFE_SECONDS)  # whatever became of the parent
    request = REQUESTS.decode_untrusted(sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 1))
    sys.stdout.buffer.write(ANSWERS.encode(perform(request)))


if __name__ == "__main__":
    main()
