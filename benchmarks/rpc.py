"""RPC round trips per second against Lattica, two processes on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.contest import Contestant, contestant, find_lattica, secrets
from benchmarks.contract import Row, Sample, compare, main, note

SECONDS = 1.5
"""Of one case in one round."""
SIZES = {"128B": 128, "256KiB": 1 << 18}
IN_FLIGHT = (1, 8, 32)


def measure(rounds: int) -> Iterator[Row]:
    """Yield a row per case."""
    cases = {
        f"rpc_{name}_x{n}_vs_lattica": {
            "kind": "rpc",
            "size": size,
            "in_flight": n,
            "seconds": SECONDS,
        }
        for name, size in SIZES.items()
        for n in IN_FLIGHT
    }
    python, reason = find_lattica()
    ours: dict[str, list[Sample]] = {case: [] for case in cases}
    theirs: dict[str, list[Sample]] = {case: [] for case in cases}
    with ExitStack() as stack:
        fabric = stack.enter_context(contestant("fabric_rpc", secrets=secrets()))
        rival: Contestant | None = None
        if python is not None:
            pair = contestant("lattica_peer", python=python, secrets=None)
            rival = stack.enter_context(pair)
        for number in range(rounds):
            note(f"round {number + 1} of {rounds}")
            for case, parameters in cases.items():
                ours[case].append(fabric.run(parameters))
                if rival is not None:
                    theirs[case].append(rival.run(parameters))
    for case in cases:
        yield compare(
            "rpc", case, "calls/s", "lattica", ours[case], theirs[case], reason
        )


if __name__ == "__main__":
    main("rpc", measure)
