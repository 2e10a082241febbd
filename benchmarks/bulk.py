"""Bulk bytes per second over one connection, two processes on loopback.

Rivals: raw threaded ``ssl`` sockets, Lattica, a stream of stock py-libp2p. Each case is
measured beside ours in the same round. What goes through a relay needs the laboratory
of NATs, hence root.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.contest import (
    Contestant,
    Message,
    contestant,
    find_lattica,
    secrets,
)
from benchmarks.contract import Row, Sample, compare, main, note
from benchmarks.members import RELAYED_BYTES, bulk_relayed
from sims.lab.namespaces import obstacle

OUR_BYTES = 512 << 20
LIBP2P_BYTES = 64 << 20
LATTICA_BLOB_BYTES = 32 << 20
"""Lattica holds a blob several times; a larger one measures the allocator."""


def measure(rounds: int) -> Iterator[Row]:
    """Yield a row per rival."""
    python, reason = find_lattica()
    cases: dict[str, tuple[str, Message]] = {
        "bulk_vs_raw_tls": ("raw ssl sockets", {"bytes": OUR_BYTES}),
        "bulk_vs_lattica": (
            "lattica",
            {"kind": "bulk", "size": LATTICA_BLOB_BYTES, "in_flight": 1, "seconds": 2},
        ),
        "bulk_vs_libp2p_stream": ("py-libp2p", {"bytes": LIBP2P_BYTES}),
    }
    ours: dict[str, list[Sample]] = {case: [] for case in cases}
    theirs: dict[str, list[Sample]] = {case: [] for case in cases}
    with ExitStack() as stack:
        fabric = stack.enter_context(contestant("fabric_bulk", secrets=secrets()))
        raw = stack.enter_context(contestant("raw_tls", secrets=secrets()))
        stock = stack.enter_context(contestant("libp2p_stream", secrets=None))
        rivals: dict[str, Contestant] = {
            "bulk_vs_raw_tls": raw,
            "bulk_vs_libp2p_stream": stock,
        }
        if python is not None:
            pair = contestant("lattica_peer", python=python, secrets=None)
            rivals["bulk_vs_lattica"] = stack.enter_context(pair)
        for number in range(rounds):
            note(f"round {number + 1} of {rounds}")
            for case, (_, parameters) in cases.items():
                ours[case].append(fabric.run({"bytes": OUR_BYTES}))
                if case in rivals:
                    theirs[case].append(rivals[case].run(parameters))
    for case, (rival, _) in cases.items():
        skipped = "" if theirs[case] else reason
        yield compare("bulk", case, "MB/s", rival, ours[case], theirs[case], skipped)
    missing = obstacle()
    if missing:
        yield compare("bulk", "bulk_relayed", "MB/s", "none", [], [], missing)
    else:
        yield from bulk_relayed("bulk", RELAYED_BYTES, rounds)


if __name__ == "__main__":
    main("bulk", measure)
