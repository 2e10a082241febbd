"""The state of port mapping as one finding that a person can act on."""

from __future__ import annotations

from collections.abc import Mapping as MappingOf
from collections.abc import Sequence

from nat.portmap.api import Finding, Mapping
from nat.portmap.config import Method
from nat.portmap.gateway import Gateway

_NAMES: dict[Method, str] = {"pcp": "PCP", "nat-pmp": "NAT-PMP", "upnp": "UPnP"}

NOT_NEEDED = "MAP_NOT_NEEDED"


def off() -> Finding:
    """Return that the operator switched it off."""
    return Finding(
        code="MAP_OFF", level="ok", reason="port mapping is off (nat.mapping.enabled)"
    )


def no_gateway(reason: str) -> Finding:
    """Return that there is no router to ask."""
    return Finding(
        code="E_MAP_NO_GATEWAY",
        level="warn",
        reason=reason or "no default gateway",
        next_step="nothing to do if peers connect; otherwise check the network's route",
    )


def not_needed(gateway: Gateway) -> Finding:
    """Return that our own address is public."""
    return Finding(
        code=NOT_NEEDED,
        level="ok",
        reason=f"{gateway.source} is a public address: no router to ask",
    )


def searching(gateway: Gateway) -> Finding:
    """Return that the answer is awaited."""
    return Finding(
        code="MAP_SEARCHING", level="ok", reason=f"asking router {gateway.address}"
    )


def nothing_works(
    gateway: Gateway, ports: Sequence[int], failures: MappingOf[Method, str]
) -> Finding:
    """Return why no method mapped anything, and what a person can do.

    Args:
        gateway: The router.
        ports: What was wanted.
        failures: The methods that refused; those that were silent are not in it.
    """
    forward = " and ".join(str(port) for port in ports)
    plural = "s" if len(ports) > 1 else ""
    step = (
        f"enable UPnP, NAT-PMP or PCP in the router, or forward TCP port{plural} "
        f"{forward} to {gateway.source} there"
    )
    if not failures:
        return Finding(
            code="E_MAP_NO_ANSWER",
            level="warn",
            reason=f"router {gateway.address} answers neither PCP, NAT-PMP nor UPnP",
            next_step=step,
        )
    details = "; ".join(f"{_NAMES[m]}: {why}" for m, why in failures.items())
    return Finding(
        code="E_MAP_REFUSED",
        level="warn",
        reason=f"router {gateway.address} maps no port ({details})",
        next_step=step,
    )


def held(mappings: Sequence[Mapping], wanted: int, refusal: str) -> Finding:
    """Return what is mapped, and what is not as it should be."""
    places = ", ".join(
        f"{m.external_ip}:{m.external_port} -> port {m.internal_port}" for m in mappings
    )
    facts = f"{_NAMES[mappings[0].method]} maps {places}"
    if not all(mapping.is_public for mapping in mappings):
        return Finding(
            code="E_MAP_NOT_PUBLIC",
            level="warn",
            reason=f"{facts}, which is not a public address: another NAT is before it",
            next_step="ask the provider for a public address, or let the outer router "
            "forward too; hole punching and relays are used meanwhile",
        )
    if len(mappings) < wanted:
        return Finding(
            code="E_MAP_PARTIAL",
            level="warn",
            reason=f"{facts}; {wanted - len(mappings)} more wanted: {refusal}",
            next_step="see the router's list of port mappings for what is in the way",
        )
    return Finding(code="MAPPED", level="ok", reason=facts)
