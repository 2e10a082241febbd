"""Find the gateway's UPnP description: the search message and the answers to it.

Anyone on the network can answer a multicast search and name any URL, so an answer
counts only when it comes from the gateway and names the gateway: otherwise a neighbour
could make us fetch from hosts of its choice, or map our ports at a router of its own.

Source: UPnP Device Architecture 2.0, section 1.3 (M-SEARCH).
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fabric.core.errors import RemoteProtocolError

MULTICAST = ("239.255.255.250", 1900)
PORT = 1900
TARGETS = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
)
MAX_BYTES = 2048
MAX_URL_CHARS = 512
_WAIT_SECONDS = 1
"""MX: devices spread their answers over this time."""


def encode_search(target: str) -> bytes:
    """Return the request for devices of type ``target``."""
    host, port = MULTICAST
    lines = (
        "M-SEARCH * HTTP/1.1",
        f"HOST: {host}:{port}",
        'MAN: "ssdp:discover"',
        f"MX: {_WAIT_SECONDS}",
        f"ST: {target}",
        "",
        "",
    )
    return "\r\n".join(lines).encode("ascii")


def decode_location_untrusted(data: bytes, gateway: str) -> str:
    """Return the URL of the description that an answer from ``gateway`` names.

    Raises:
        RemoteProtocolError: oversized, not an answer, or a URL elsewhere.
    """
    if len(data) > MAX_BYTES:
        raise RemoteProtocolError(f"SSDP answer of {len(data)} B > {MAX_BYTES} B")
    try:
        head, *lines = data.decode("ascii").splitlines()
    except ValueError as exc:  # no ASCII, or empty
        raise RemoteProtocolError("SSDP answer is not text") from exc
    if head.split()[:2] != ["HTTP/1.1", "200"]:
        raise RemoteProtocolError("not an answer to a search")
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() == "location":
            return check_url_untrusted(value.strip(), gateway)
    raise RemoteProtocolError("SSDP answer without LOCATION")


def check_url_untrusted(url: str, gateway: str) -> str:
    """Return ``url`` if it leads to ``gateway`` by HTTP.

    Raises:
        RemoteProtocolError: it does not, or is too long.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        same = ipaddress.ip_address(host) == ipaddress.ip_address(gateway)
    except ValueError as exc:
        raise RemoteProtocolError("the device's URL names no address") from exc
    plain = parts.scheme == "http" and "@" not in parts.netloc and port > 0
    if not (same and plain and len(url) <= MAX_URL_CHARS and url.isprintable()):
        raise RemoteProtocolError(f"the device's URL is not at {gateway}")
    return url
