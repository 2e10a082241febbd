"""All-reduce of 64 MiB: the fabric backend beside gloo and hivemind.

Over shared memory between ranks of one host, over TLS between ranks that share nothing,
and in namespaces whose links are shaped to 1 Gbit/s. Values are MB/s of the reduced
tensor, so more is better. CPU is of all ranks, per all-reduce.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.contest import Message, Process
from benchmarks.contract import Row, Sample, compare, main, note
from sims.lab.namespaces import obstacle
from sims.lab.network import Network
from sims.lab.topology import NatKind, Shape, Site, Topology

BENCH = "collectives"
BYTES = 64 << 20
TIMES = 3
GIGABIT = 1000.0
SHAPED_RANKS = 4
SHAPED_PORT = 29_400
HIVEMIND_ENVIRONMENT = Path(__file__).parent.parent / ".venv" / "rivals" / "hivemind"
LOOPBACK = "127.0.0.1"


class Ranks:
    """Processes that all do the same at once."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._processes = processes

    def all_reduce(self, command: Message) -> Sample:
        """Return the rate of the slowest rank, and the CPU of all per all-reduce."""
        before = self._each({"do": "usage"})
        answers = self._each({"do": "run", "bytes": BYTES, "times": TIMES, **command})
        after = self._each({"do": "usage"})
        if errors := [a["error"] for a in answers if "error" in a]:
            raise RuntimeError(f"{command}: {errors}")
        spent = sum(a["cpu"] - b["cpu"] for a, b in zip(after, before, strict=True))
        return Sample(
            value=BYTES / max(a["seconds"] for a in answers) / 1e6,
            cpu_seconds=spent / (TIMES + 1),  # one all-reduce goes before, untimed
            peak_rss_bytes=max(a["rss"] for a in after),
        )

    def _each(self, message: Message) -> list[Message]:
        for process in self._processes:
            process.tell(message)
        return [process.listen() for process in self._processes]


def measure(rounds: int) -> Iterator[Row]:
    """Yield a row per case."""
    for world in (2, 4):
        kinds = ["gloo", "local"] if world == 2 else ["gloo", "local", "tls", "tcp"]
        with ExitStack() as stack:
            ranks = stack.enter_context(_torch_ranks(world, kinds))
            rival, reason = None, ""
            if world == 4:
                rival, reason = _hivemind(stack, world)
            samples = _interleaved(ranks, kinds, rounds, rival)
        yield _row(f"allreduce_64MiB_{world}_local_vs_gloo", samples, "local", "gloo")
        if world == 4:
            yield _row(
                "allreduce_64MiB_4_tls_vs_gloo",
                samples,
                "tls",
                "gloo",
                _cipher(samples),
            )
            yield _row(
                "allreduce_64MiB_4_tls_vs_hivemind", samples, "tls", "hivemind", reason
            )
    yield _shaped(rounds)


def _interleaved(
    ranks: Ranks, kinds: Sequence[str], rounds: int, rival: Ranks | None
) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {kind: [] for kind in [*kinds, "hivemind"]}
    for number in range(rounds):
        note(f"round {number + 1} of {rounds}")
        for kind in kinds:
            samples[kind].append(ranks.all_reduce({"kind": kind}))
        if rival is not None:
            samples["hivemind"].append(rival.all_reduce({}))
    return samples


def _row(
    case: str,
    samples: dict[str, list[Sample]],
    ours: str,
    rival: str,
    skipped: str = "",
) -> Row:
    return compare(BENCH, case, "MB/s", rival, samples[ours], samples[rival], skipped)


def _cipher(samples: dict[str, list[Sample]]) -> str:
    """Say what of our processor time the cipher takes: it bounds the ratio."""
    spent = {
        kind: min(sample.cpu_seconds for sample in samples[kind])
        for kind in ("tls", "tcp")
    }
    share = 1 - spent["tcp"] / spent["tls"]
    return f"the cipher takes {share:.0%} of our CPU (plain TCP: {spent['tcp']:.2f} s)"


@contextmanager
def _torch_ranks(
    world: int, kinds: Sequence[str], network: Network | None = None
) -> Iterator[Ranks]:
    if network is None:
        ips, port = [LOOPBACK] * world, _free_port()
    else:
        # gloo and the store listen where the site is
        ips = [network.address(f"rank-{rank}") for rank in range(world)]
        port = SHAPED_PORT
    with ExitStack() as stack:
        processes = []
        for rank in range(world):
            enter = network.enter(f"rank-{rank}") if network is not None else ()
            process = Process(
                sys.executable,
                "allreduce_rank",
                str(rank),
                str(world),
                ips[0],
                str(port),
                ips[rank],
                ",".join(kinds),
                enter=enter,
            )
            stack.callback(process.close)
            processes.append(process)
        for process in processes:
            process.listen()
        yield Ranks(processes)


def _shaped(rounds: int) -> Row:
    case = "allreduce_1gbit_vs_gloo"
    missing = obstacle()
    if missing:
        return compare(BENCH, case, "MB/s", "gloo", [], [], missing)
    shape = Shape(rate_mbit=GIGABIT)
    sites = tuple(
        Site(name=f"rank-{rank}", kind=NatKind.NONE, shape=shape)
        for rank in range(SHAPED_RANKS)
    )
    kinds = ["gloo", "measured"]
    with (
        Network(Topology(sites=sites)) as network,
        _torch_ranks(SHAPED_RANKS, kinds, network) as ranks,
    ):
        samples = _interleaved(ranks, kinds, rounds, None)
    return _row(case, samples, "measured", "gloo", f"{SHAPED_RANKS} ranks, TLS")


def _hivemind(stack: ExitStack, world: int) -> tuple[Ranks | None, str]:
    """Return (peers of hivemind, or None; why there are none)."""
    python = _find_hivemind()
    if python is None:
        return None, (
            "hivemind is not installed: run `make bench-setup`, or name a python that "
            "has it in FABRIC_BENCH_HIVEMIND_PYTHON"
        )
    processes: list[Process] = []
    join: Message = {}
    for _ in range(world):
        process = Process(python, "hivemind_rank", str(world), str(BYTES))
        stack.callback(process.close)
        joined = process.ask(join)
        join = join or joined
        processes.append(process)
    return Ranks(processes), ""


def _find_hivemind() -> str | None:
    own = os.environ.get("FABRIC_BENCH_HIVEMIND_PYTHON")
    python = own or str(HIVEMIND_ENVIRONMENT / "bin" / "python")
    try:
        probe = subprocess.run(
            [python, "-c", "import hivemind"], capture_output=True, check=False
        )
    except OSError:
        return None
    return python if probe.returncode == 0 else None


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main(BENCH, measure)
