"""Which pairs of sites can be direct over TCP: mapping against filtering.

A connection between two NATs needs a SYN that the other side's NAT lets in. What lets
it in is what that NAT has sent before. So the question is whether one side can name the
endpoint that the other's SYN will come from, or has a filter that does not care.
"""

from __future__ import annotations

from sims.lab.topology import Behaviour, Filtering, Mapping, NatKind


def can_be_direct(one: Behaviour, other: Behaviour) -> bool:
    """Return whether peers behind ``one`` and ``other`` can have a TCP connection.

    Sequential mappings count as unpredictable, see :func:`is_a_guess`; an open port of
    the one's choice (443) reaches public peers only, who listen there.
    """
    return _reaches(one, other) or _reaches(other, one)


def is_a_guess(one: Behaviour, other: Behaviour) -> bool:
    """Return whether port prediction makes the pair direct once the NAT is quiet.

    Guessing the next port is a race with everybody else behind that NAT, and with our
    own connections to others: it is lost while a mesh forms and won soon afterwards.
    """
    predictable = _with_predicted_ports(one), _with_predicted_ports(other)
    return not can_be_direct(one, other) and can_be_direct(*predictable)


def _with_predicted_ports(behaviour: Behaviour) -> Behaviour:
    if behaviour.mapping is not Mapping.SEQUENTIAL:
        return behaviour
    return Behaviour(
        filtering=behaviour.filtering,
        resets=behaviour.resets,
        only_port=behaviour.only_port,
        layers=behaviour.layers,
    )


def _reaches(dialler: Behaviour, target: Behaviour) -> bool:
    """Return whether a SYN from behind ``dialler`` can be let in by ``target``.

    RST in answer to an early SYN costs a retry, not the connection: it ends the
    attempt, and the mapping it belonged to is made anew by the next SYN.
    """
    if target.mapping is Mapping.NONE:
        # also if one port may be dialled only: public hosts listen there for all
        return True
    if dialler.only_port:
        # whatever was punched or offered has a port of the system's choice
        return False
    if target.only_port:
        # it opens no mapping but towards that one port
        return False
    if not target.mapping.independent:
        # where to dial? its mapping towards us exists only once we know ours
        return False
    if target.filtering in (Filtering.NONE, Filtering.INDEPENDENT):
        return True
    if target.filtering is Filtering.ADDRESS:
        # it sends one SYN to our address, to any port
        return True
    # address and port: it must have sent to the very port our SYN comes from
    return dialler.mapping.independent


EXPECTED_DIRECT = {
    frozenset((one, other)): can_be_direct(one.behaviour, other.behaviour)
    for one in NatKind
    for other in NatKind
}
"""By the pair of kinds, each behind a gateway of its own."""
