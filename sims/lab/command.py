"""``fabric sim lab``: NATs of chosen kinds, a daemon behind each, every pair timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import cyclopts

from fabric.app.cli_output import show_json, show_table, talk
from fabric.core.errors import ConfigError
from sims.lab.lab import Lab
from sims.lab.measure import PairResult, form_and_measure
from sims.lab.topology import NatKind, Shape, Site, Topology

HEADINGS = ("PAIR", "FIRST PATH", "FIRST RPC S", "DIRECT S", "PATH", "RTT MS")


def lab(
    *,
    kinds: str = "cone,symmetric",
    relays: int = 2,
    delay_ms: float = 0.0,
    rate_mbit: float = 0.0,
    patience: float = 30.0,
    set: Annotated[tuple[str, ...], cyclopts.Parameter(negative="")] = (),
    keep: bool = False,
    json: bool = False,
) -> None:
    """Build NATs of these kinds on this machine, a peer behind each; time all pairs.

    Needs root on Linux. Everything is removed at the end.

    Args:
        kinds: What stands before each peer, joined by commas: none, full_cone,
            cone_adf, cone, cone_remap, rst, symmetric, symmetric_seq, cgnat,
            udp_blocked, only_443. A kind may be named several times.
        relays: Public peers besides; the first founds the mesh.
        delay_ms: One way, of each NATed site's link.
        rate_mbit: Each way, of each NATed site's link; 0 does not limit.
        patience: Seconds that all pairs have.
        set: Settings of every daemon as key=value.
        keep: Stay until Ctrl+C when the table is printed.
        json: Print JSON.
    """
    topology = topology_of(kinds, relays, delay_ms, rate_mbit)
    with Lab(topology, set) as laboratory:
        laboratory.start()
        results = form_and_measure(laboratory, patience, tell=talk)
        if json:
            show_json(results)
        else:
            show_pairs(results)
        if keep:
            _stay(laboratory)


def topology_of(kinds: str, relays: int, delay_ms: float, rate_mbit: float) -> Topology:
    """Return public hosts ``relay-N`` and one site per kind, named after it.

    Raises:
        ConfigError: there is no such kind, or no relay.
    """
    if relays < 1:
        raise ConfigError("--relays: at least one public peer is needed to meet at")
    shape = Shape(rate_mbit=rate_mbit, delay_seconds=delay_ms / 1000)
    sites = [Site(name=f"relay-{i}") for i in range(relays)]
    names: list[str] = []
    for text in filter(None, kinds.split(",")):
        if text not in list(NatKind):
            known = ", ".join(NatKind)
            raise ConfigError(f"--kinds: no kind {text!r}", next_step=f"kinds: {known}")
        names.append(text)
        name = f"{text}-{names.count(text)}"
        sites.append(Site(name=name, kind=NatKind(text), shape=shape))
    return Topology(sites=tuple(sites))


def show_pairs(results: Sequence[PairResult]) -> None:
    """Print one row per pair; ``!`` marks what NATs would allow and did not happen."""
    show_table(HEADINGS, [row_of(result) for result in results])
    connected = sum(result.connected for result in results)
    possible = [result for result in results if result.can_be_direct]
    direct = sum(result.direct_seconds is not None for result in possible)
    talk(f"{connected} of {len(results)} pairs can call each other")
    talk(f"{direct} of {len(possible)} that can be direct are")
    for result in results:
        if result.failure:
            talk(f"{result.one} -> {result.other}: {result.failure}")


def row_of(result: PairResult) -> tuple[object, ...]:
    """Return the table's row of one pair."""
    return (
        f"{result.one} {result.other}",
        result.first_path or "-",
        result.first_rpc_seconds,
        result.direct_seconds,
        (result.path or "-") + ("" if result.as_expected else " !"),
        result.rtt_ms,
    )


def _stay(laboratory: Lab) -> None:
    for host in laboratory.hosts:
        home = laboratory.mesh.peer(host).home
        enter = " ".join(laboratory.network.enter(host))
        talk(f"{host}: fabric status --home {home}; shell: {enter} bash")
    talk("Ctrl+C removes the laboratory")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        talk("removing")
