"""``fabric sim lab``: NATs of chosen kinds, a daemon behind each, every pair timed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from types import FrameType
from typing import Annotated

import cyclopts

from fabric.app.cli_output import show_json, show_table, talk
from fabric.core.errors import ConfigError, FabricError, NoRoute
from sims.lab.lab import Lab
from sims.lab.measure import PairResult, form_and_measure
from sims.lab.topology import NatKind, Shape, Site, Topology

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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

    Needs root on Linux. Everything is removed at the end, also after Ctrl+C. Exits with
    3 if a pair cannot call each other, with 1 if one is relayed that could be direct.

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
    with stopped_once(), Lab(topology, set) as laboratory:
        talk(
            f"{len(topology.sites)} networks stand, {len(laboratory.hosts)} peers start"
        )
        laboratory.start()
        results = form_and_measure(laboratory, patience, tell=talk)
        if json:
            show_json(results)
        else:
            show_pairs(results)
        if keep:
            _stay(laboratory)
    judge(results)


@contextmanager
def stopped_once() -> Iterator[None]:
    """Let the first Ctrl+C or SIGTERM inside end the block, and no other its cleaning.

    A laboratory that is cut off while it is removed leaves daemons and networks.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        talk("removing the laboratory")
        raise KeyboardInterrupt

    before = {each: signal.signal(each, stop) for each in STOPPING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def judge(results: Sequence[PairResult]) -> None:
    """Refuse results that are worse than the NATs allow.

    Raises:
        NoRoute: a pair cannot call each other.
        FabricError: a pair is relayed that could be direct.
    """
    lost = sum(not result.connected for result in results)
    if lost:
        raise NoRoute(
            f"{lost} of {len(results)} pairs cannot call each other",
            next_step="--keep lets the daemons run: ask `fabric why PEER` there",
        )
    relayed = sum(not result.as_expected for result in results)
    if relayed:
        raise FabricError(
            f"{relayed} of {len(results)} pairs are relayed that could be direct",
            code="E_NOT_DIRECT",
            next_step="more --patience; or --keep, and `fabric why PEER` there",
        )


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
    direct = sum(result.as_expected for result in possible)
    firsts = [result.first_rpc_seconds for result in results]
    directs = [result.direct_seconds for result in possible]
    talk(f"{connected} of {len(results)} pairs can call each other{_spread(firsts)}")
    talk(f"{direct} of {len(possible)} that can be direct are{_spread(directs)}")
    for result in results:
        if result.failure:
            talk(f"{result.one} -> {result.other}: {result.failure}")


def _spread(seconds: Iterable[float | None]) -> str:
    known = [each for each in seconds if each is not None]
    if not known:
        return ""
    return f": after {median(known):.1f} s in the median, {max(known):.1f} s at most"


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
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
