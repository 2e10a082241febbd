"""What NATs do to TCP, and whether two of them can be punched: pure.

Words of RFC 4787 sections 4 and 5, which RFC 5382 applies to TCP. A NAT *maps* a local
port either to one public port whatever the destination (endpoint-independent), or to
another one for each (here "address_dependent", commonly "symmetric"). It *filters* what
arrives at a mapped port: anything passes, or only what comes from an address, or from
an address and port, that was sent to before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from fabric.net.ports import ALLOWED, Decision

Mapping = Literal["endpoint_independent", "address_dependent", "unknown"]
Filtering = Literal[
    "endpoint_independent",
    "address_dependent",
    "address_and_port_dependent",
    "unknown",
]
Address = tuple[str, int]
"""(IP, port)."""

IMPOSSIBLE = "E_PUNCH_IMPOSSIBLE"
"""These two NATs cannot be punched; asking again helps once a network changes."""
FAILED = "E_PUNCH_FAILED"
"""It may go better later."""

MAX_PORT_STEP = 16
"""Two consecutive mappings further apart are not sequential allocation."""
NUM_PREDICTED = 3
"""Mappings ahead to try: other connections of the site take some in between."""
_LOWEST_PORT = 1024


class NatFacts(msgspec.Struct, frozen=True):
    """What one side knows of the NAT in front of it; sent in CONNECT.

    Attributes:
        mapping: How it maps ports.
        filtering: What it lets in.
        public: Whether unsolicited connections from anywhere arrive.
        port_step: Distance of two consecutive mapped ports; 0 if not sequential.
    """

    mapping: Mapping = "unknown"
    filtering: Filtering = "unknown"
    public: bool = False
    port_step: int = 0


UNKNOWN = NatFacts()


def learn_mapping(observed: Sequence[Address], known: NatFacts) -> NatFacts:
    """Return ``known`` with what consecutive observations of one local port say.

    Args:
        observed: The port as observers at different addresses saw it, in the order in
            which they were connected to.
        known: From earlier; the mapping of two fresh observations overrides it.
    """
    if len(observed) < 2:
        return known
    if len(set(observed)) == 1:
        return msgspec.structs.replace(
            known, mapping="endpoint_independent", port_step=0
        )
    step = observed[1][1] - observed[0][1]
    sequential = observed[0][0] == observed[1][0] and 0 < abs(step) <= MAX_PORT_STEP
    return msgspec.structs.replace(
        known, mapping="address_dependent", port_step=step if sequential else 0
    )


def predict_ports(last_port: int, step: int) -> tuple[int, ...]:
    """Return the ports a sequential NAT will likely map next, likeliest first.

    A step above one may be a NAT's habit, or one with a connection of somebody else in
    between: both are foretold.
    """
    if not step:
        return ()
    strides = dict.fromkeys((step, 1 if step > 0 else -1))
    guesses = (last_port + s * k for s in strides for k in range(1, NUM_PREDICTED + 1))
    return tuple(dict.fromkeys(p for p in guesses if _LOWEST_PORT <= p <= 65535))


def can_punch(own: NatFacts, peer: NatFacts, *, same_site: bool = False) -> Decision:
    """Return whether a punch is worth its three seconds; everything possible is.

    Args:
        own: Our side.
        peer: The other side, as it says.
        same_site: Both are behind one NAT, so private addresses lead across.
    """
    if same_site or own.public or peer.public:
        return ALLOWED
    own_hard, peer_hard = _is_symmetric(own), _is_symmetric(peer)
    if own_hard and peer_hard:
        if own.port_step and peer.port_step:
            return ALLOWED
        return _refuse("both sides map per destination (symmetric NAT): relay stays")
    if not own_hard and not peer_hard:
        return ALLOWED
    hard, easy = (own, peer) if own_hard else (peer, own)
    if hard.port_step or easy.filtering != "address_and_port_dependent":
        # the listener on the punched port accepts the port that nobody could foretell
        return ALLOWED
    return _refuse(f"{_one_sided(own_hard)}: relay stays")


def explain_failure(own: NatFacts, peer: NatFacts, seconds: float) -> tuple[str, bool]:
    """Return why a punch that was worth trying failed, and whether that may pass."""
    own_hard, peer_hard = _is_symmetric(own), _is_symmetric(peer)
    if own_hard and peer_hard:
        return (
            "both sides map per destination (symmetric NAT) and no predicted port "
            "was right: relay stays",
            True,
        )
    if own_hard or peer_hard:
        hard = own if own_hard else peer
        reason = f"{_one_sided(own_hard)}: relay stays"
        return reason, bool(hard.port_step)
    return f"no connection crossed both NATs within {seconds:g} s", True


def _is_symmetric(facts: NatFacts) -> bool:
    return facts.mapping == "address_dependent"


def _one_sided(own_hard: bool) -> str:
    hard, easy = ("our", "the peer's") if own_hard else ("the peer's", "our")
    return (
        f"{hard} NAT maps per destination (symmetric NAT) and {easy} lets in only "
        "addresses and ports that were dialled"
    )


def _refuse(reason: str) -> Decision:
    return Decision(
        allowed=False,
        code=IMPOSSIBLE,
        reason=reason,
        next_step="map a port on one of the two routers, or use IPv6",
    )
