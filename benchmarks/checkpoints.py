"""Checkpoints of 1.4 GiB: save, stall, load, reshard, convert.

Beside torch's DCP and the raw limits of this machine, measured in the same rounds:
memory to memory into a buffer that is there, write and fsync, read of as many bytes as
the rank needs. Ratios of costs: below 1 is faster than the rival. Loads are measured
from the disk and, as "warm", from the page cache: there a read is a copy, and verifying
costs more than reading.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contract import Row, Sample, compare, main, note

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 900.0
BENCH = "checkpoints"
Times = dict[str, list[list[float]]]


def measure(rounds: int) -> Iterator[Row]:
    """Yield a row per case."""
    base = Path(tempfile.mkdtemp(prefix="checkpoint-bench-"))
    try:
        yield from _saves(base, rounds, 1, "whole")
        yield from _loads(base, rounds, 1, "whole", "ours-whole-1", "load")
        yield from _saves(base, rounds, 4, "fsdp")
        shutil.rmtree(base / "ours-whole-1")
        shutil.rmtree(base / "dcp-whole-1")
        yield from _loads(base, rounds, 2, "fsdp", "ours-fsdp-4", "reshard_4_2")
        yield from _loads(base, rounds, 2, "tp", "ours-fsdp-4", "reshard_fsdp_tp")
        yield from _converts(base, rounds)
        yield from _saves(base, rounds, 2, "fsdp")
        yield from _loads(base, rounds, 4, "fsdp", "ours-fsdp-2", "reshard_2_4")
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _saves(base: Path, rounds: int, world: int, layout: str) -> Iterator[Row]:
    times = _ranks(base, rounds, world, layout, "save")
    whole = [
        [a[0] + b[0], a[1] + b[1]]
        for a, b in zip(times["stall"], times["rest"], strict=True)
    ]
    tail = "" if world == 1 else f"_{world}_ranks"
    yield _row(f"save{tail}_vs_raw", whole, "write + fsync", times["raw"])
    yield _row(f"save{tail}_vs_dcp", whole, "dcp.save", times["dcp"])
    yield _row(f"stall{tail}_vs_memcpy", times["stall"], "memcpy", times["memcpy"])
    yield _row(
        f"stall{tail}_vs_dcp", times["stall"], "dcp.async_save", times["dcp_stall"]
    )
    if world > 1:
        yield _row(f"plan_first{tail}_seconds", times["plan_first"], "none", [])
        yield _row(f"plan_again{tail}_seconds", times["plan_again"], "none", [])


def _loads(
    base: Path, rounds: int, world: int, layout: str, source: str, case: str
) -> Iterator[Row]:
    times = _ranks(base, rounds, world, layout, "load", source)
    for how, tail in (("cold", ""), ("warm", "_warm")):
        ours = times[f"load_{how}"]
        yield _row(f"{case}{tail}_vs_raw", ours, "read", times[f"raw_{how}"])
        yield _row(f"{case}{tail}_vs_dcp", ours, "dcp.load", times[f"dcp_{how}"])


def _converts(base: Path, rounds: int) -> Iterator[Row]:
    source, target = base / "dcp-fsdp-4", base / "converted.pt"
    found: dict[str, list[dict[str, float]]] = {"ours": [], "dcp": [], "raw": []}
    for number in range(rounds):
        note(f"convert: round {number + 1} of {rounds}")
        for how, answers in found.items():
            module = "benchmarks.peers.checkpoint_convert"
            answers.append(_child(module, how, str(source), str(target)))
            target.unlink()
    samples = {
        how: [
            Sample(
                value=a["seconds"], cpu_seconds=a["cpu"], peak_rss_bytes=int(a["peak"])
            )
            for a in answers
        ]
        for how, answers in found.items()
    }
    yield compare(
        BENCH,
        "convert_vs_dcp",
        "s",
        "dcp_to_torch_save",
        samples["ours"],
        samples["dcp"],
    )
    yield compare(
        BENCH, "convert_vs_raw", "s", "copy + fsync", samples["ours"], samples["raw"]
    )
    extra = {
        how: [Sample(value=max(1.0, a["extra"] / 2**20)) for a in answers]
        for how, answers in found.items()
    }
    yield compare(
        BENCH,
        "convert_extra_rss_mib",
        "MiB",
        "dcp_to_torch_save",
        extra["ours"],
        extra["dcp"],
    )


def _row(
    case: str,
    ours: Sequence[Sequence[float]],
    rival: str,
    theirs: Sequence[Sequence[float]],
) -> Row:
    def samples(values: Sequence[Sequence[float]]) -> list[Sample]:
        return [Sample(value=v[0], cpu_seconds=v[1]) for v in values]

    return compare(BENCH, case, "s", rival, samples(ours), samples(theirs))


def _ranks(
    base: Path, rounds: int, world: int, layout: str, do: str, source: str = ""
) -> Times:
    note(f"{do}: {world} ranks, {layout}{', from ' + source if source else ''}")
    plan = {
        "world": world,
        "layout": layout,
        "do": do,
        "base": str(base),
        "rounds": rounds,
        "source": source,
    }
    times: Times = _child("benchmarks.peers.checkpoint_ranks", json.dumps(plan))[
        "times"
    ]
    return times


def _child(module: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT_SECONDS,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main(BENCH, measure)
