"""Which path two NATs allow, decided by the daemon's own rule.

The facts each side would learn of its NAT go through :func:`nat.punch.facts.can_punch`;
what the rule refuses is relayed, as in the daemon.
"""

from __future__ import annotations

from fabric.core.errors import ConfigError
from fabric.net.ports import PathKind
from nat.punch.facts import NatFacts, can_punch
from sims.lab.topology import Filtering, Mapping, NatKind

_FILTERING = {
    Filtering.NONE: "endpoint_independent",
    Filtering.INDEPENDENT: "endpoint_independent",
    Filtering.ADDRESS: "address_dependent",
    Filtering.ADDRESS_AND_PORT: "address_and_port_dependent",
}


def facts_of(kind: NatKind) -> NatFacts:
    """Return what a peer behind ``kind`` finds out about its NAT."""
    behaviour = kind.behaviour
    return NatFacts(
        mapping=(
            "endpoint_independent"
            if behaviour.mapping.independent
            else "address_dependent"
        ),
        filtering=_FILTERING[behaviour.filtering],  # type: ignore[arg-type]
        public=behaviour.mapping is Mapping.NONE,
        port_step=1 if behaviour.mapping is Mapping.SEQUENTIAL else 0,
    )


def path_between(one: NatKind, other: NatKind) -> PathKind:
    """Return how peers behind these kinds reach each other."""
    if NatKind.ONLY_443 in (one, other):
        return "relay"  # nothing but the relay's port may be dialled
    mine, theirs = facts_of(one), facts_of(other)
    if mine.public or theirs.public:
        return "direct"
    return "punched" if can_punch(mine, theirs).allowed else "relay"


def kind_named(text: str) -> NatKind:
    """Return the kind of NAT called ``text``.

    Raises:
        ConfigError: there is none.
    """
    if text not in list(NatKind):
        raise ConfigError(f"no kind of NAT {text!r}", next_step=f"{', '.join(NatKind)}")
    return NatKind(text)
