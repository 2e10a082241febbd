"""Peers behind NATs: who can call whom, how soon directly, and how fast. Needs root.

Rivals in the same laboratory: py-libp2p's own DCUtR for hole punching; raw ``ssl``
sockets, punched by hand through the same gateways, for bytes per second. What is timed:

    punch_*_seconds        from the first relayed connection of the two peers until both
                           have a direct one; the rival's likewise, on the dialler
    punch_*_sync_seconds   of that, from SYNC (both have agreed to punch) on
    data_punch_*_seconds   one data-plane socket, from SYNC on
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from benchmarks.contest import Process
from benchmarks.contract import Row, Sample, compare, main, note
from benchmarks.members import (
    READY_SECONDS,
    RELAYED_BYTES,
    RELAYS,
    Members,
    bulk_direct,
    bulk_relayed,
    peers_behind,
)
from fabric.core.errors import PeerTimeout
from sims.lab.lab import Lab
from sims.lab.measure import form_and_measure
from sims.lab.namespaces import obstacle
from sims.lab.network import Network
from sims.lab.topology import NatKind, Site, Topology
from sims.local import wait_until

MATRIX_SECONDS = 60.0
RIVAL_WAIT_SECONDS = 15.0
"""py-libp2p tries three times, 5 s apart."""
RIVAL_PORT = 4001
TARGET_SECONDS = 0.2
PUNCHES = 8
"""Of the data plane per round: the peers allow 12 in a row."""
DIRECT_BYTES = 256 << 20
PUNCH_KINDS = {"cone_cone": NatKind.CONE, "rst": NatKind.RST}
CASES = (
    "pairs_connected",
    "direct_where_possible",
    "punch_cone_cone_seconds",
    "punch_rst_seconds",
    "direct_bulk_vs_raw_tls",
    "bulk_relayed",
)
NO_SPARES = {"nat.punch.bulk_sockets": 0}
"""Spares are punched ahead of demand; here every one asked for is to be punched."""


def measure(rounds: int) -> Iterator[Row]:
    """Yield a row per case."""
    reason = obstacle()
    if reason:
        for case in CASES:
            yield compare("nat", case, "-", "none", [], [], reason)
        return
    yield from matrix()
    for name, kind in PUNCH_KINDS.items():
        yield from punches(name, kind, rounds)
    yield bulk_direct("nat", "direct_bulk_vs_raw_tls", DIRECT_BYTES, rounds)
    yield from bulk_relayed("nat", RELAYED_BYTES, rounds)


def matrix() -> Iterator[Row]:
    """Have every kind of NAT call every other; each count is one sample."""
    note("every pair of kinds")
    kinds = [kind for kind in NatKind if kind is not NatKind.NONE]
    sites = tuple(Site(name=kind.value, kind=kind) for kind in kinds)
    with Lab(Topology(sites=(*RELAYS, *sites))) as lab:
        lab.start()
        results = form_and_measure(lab, MATRIX_SECONDS)
    possible = [result for result in results if result.can_be_direct]
    direct = [result for result in possible if result.as_expected]
    connected = [result for result in results if result.connected]
    for case, some, every in (
        ("pairs_connected", connected, results),
        ("direct_where_possible", direct, possible),
    ):
        share = Sample(value=len(some) / len(every))
        count = f"{len(some)} of {len(every)} pairs"
        yield compare("nat", case, "share", "none", [share], [], count)
    for case, seconds in (
        ("first_call_seconds", [r.first_rpc_seconds for r in connected]),
        ("first_direct_call_seconds", [r.direct_seconds for r in direct]),
    ):
        values = [value for value in seconds if value is not None]
        samples = [Sample(value=value) for value in values]
        most = f"{len(values)} pairs, most {max(values, default=0):.1f} s"
        yield compare("nat", case, "s", "none", samples, [], most)


def punches(name: str, kind: NatKind, rounds: int) -> Iterator[Row]:
    """Time upgrades of relayed connections, ours and py-libp2p's, and data sockets."""
    upgrades: list[Sample] = []
    syncs: list[float] = []
    sockets: list[float] = []
    theirs: list[Sample] = []
    failed = 0
    for number in range(rounds):
        note(f"punch_{name}: round {number + 1} of {rounds}")
        found = our_punches(kind)
        if found.upgrade is not None:
            upgrades.append(Sample(value=found.upgrade))
        syncs += found.syncs
        sockets += found.sockets
        failed += found.failed
        rival = rival_punch(kind)
        if rival is not None:
            theirs.append(Sample(value=rival))
    rival_name = "py-libp2p DCUtR"
    missed = "" if len(upgrades) == rounds else f"ours: {len(upgrades)} of {rounds}; "
    if not theirs:
        missed += f"rival: none of {rounds} direct within {RIVAL_WAIT_SECONDS:g} s"
    case = f"punch_{name}_seconds"
    yield compare("nat", case, "s", rival_name, upgrades, theirs, missed)
    for case, values, lost in (
        (f"punch_{name}_sync_seconds", syncs, 0),
        (f"data_punch_{name}_seconds", sockets, failed),
    ):
        samples = [Sample(value=value) for value in values]
        yield compare("nat", case, "s", "none", samples, [], _spread(values, lost))


@dataclass(frozen=True)
class Punches:
    """Seconds of one round.

    Attributes:
        upgrade: From relayed to direct; None when it did not come to that.
        syncs: Of it, from SYNC on.
        sockets: Of data-plane sockets, from SYNC on.
        failed: Data-plane punches that gave up.
    """

    upgrade: float | None
    syncs: list[float]
    sockets: list[float]
    failed: int


def our_punches(kind: NatKind) -> Punches:
    """Have one upgrade and some data-plane punches between two homes of ``kind``."""
    with Network(peers_behind(kind)) as network, ExitStack() as stack:
        members = Members(network, stack, NO_SPARES, watch=True)

        def direct() -> bool:
            return all("direct" in home["seen"] for home in members.contacts())

        with suppress(PeerTimeout):
            wait_until(direct, READY_SECONDS, "an upgrade", poll=0.1)
        homes = members.contacts()
        first = min(home["seen"].get("relay", math.inf) for home in homes)
        last = max(home["seen"].get("direct", math.inf) for home in homes)
        took = last - first if last < math.inf else None
        syncs = [seconds for home in homes for seconds in home["punches"]]
        asked = {"do": "punch", "peer": members.ids["b"], "times": PUNCHES}
        data = members.ask("a", asked)
        return Punches(took, syncs, data["punches"], data["failed"])


def rival_punch(kind: NatKind) -> float | None:
    """Return py-libp2p's seconds from relayed to direct; None when it gave up."""
    with Network(peers_behind(kind)) as network, ExitStack() as stack:

        def start(host: str, role: str) -> Process:
            enter = network.enter(host)
            process = Process(sys.executable, "libp2p_dcutr", role, enter=enter)
            stack.callback(process.close)
            return process

        relay = start("relay-0", "relay").ask({})["peer"]
        ip = network.public_address("relay-0")
        address = f"/ip4/{ip}/tcp/{RIVAL_PORT}/p2p/{relay}"
        listener = start("a", "listen").ask({"relay": address})
        if not listener["reserved"]:
            raise RuntimeError("py-libp2p got no reservation: nothing was compared")
        asked = {"relay": address, "peer": listener["peer"], "wait": RIVAL_WAIT_SECONDS}
        answer: float | None = start("b", "dial").ask(asked)["seconds"]
        return answer


def _spread(values: list[float], failed: int) -> str:
    """Return how far the samples lie apart, in words."""
    lost = f", {failed} failed" if failed else ""
    if len(values) < 2:
        return f"{len(values)} samples{lost}"
    below = sum(value < TARGET_SECONDS for value in values)
    return (
        f"{below} of {len(values)} below {TARGET_SECONDS:g} s, most {max(values):.3f} s"
        f"{lost}"
    )


if __name__ == "__main__":
    main("nat", measure)
