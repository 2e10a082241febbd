"""Multiaddrs as people write them."""

from __future__ import annotations

from fabric.core.ids import short

_CIRCUIT = "/p2p-circuit"


def short_addr(addr: str) -> str:
    """Return "ip:port", "via RELAY" for a circuit, or ``addr`` without the peer's id.

    A name of a host stands for its IP; who the relay is tells more than where it is.
    """
    head, circuit, _ = addr.partition(_CIRCUIT)
    if circuit:
        return f"via {short(head.rpartition('/p2p/')[2])}"
    parts = addr.split("/")
    if len(parts) > 4 and parts[3] == "tcp":
        host = f"[{parts[2]}]" if parts[1] == "ip6" else parts[2]
        return f"{host}:{parts[4]}"
    return addr.rpartition("/p2p/")[0] or addr
