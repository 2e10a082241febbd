"""The replicated store: CPU, bytes and memory, beside pycrdt and loro documents.

CPU time, not wall time, wherever the work is computing: other programs then do not
change the figures. The documents neither sign nor check who wrote what, and an idle
exchange of theirs grows with every writer there ever was.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.contract import Row, Sample, compare, main, note
from benchmarks.store_contestants import KINDS, NUM_WRITERS, Slots
from benchmarks.store_heal import healed
from crdt_store.entry import decode_entry_untrusted

BENCH = "store"
INGESTED = 3000
ENTRIES = 100_000
RIVALS = ("pycrdt", "loro")


def _micros(work: Callable[[], object], count: int) -> Sample:
    started = time.process_time()
    work()
    seconds = (time.process_time() - started) / count
    return Sample(value=seconds * 1e6, cpu_seconds=seconds)


def ingest(kind) -> Sample:
    """Return the microseconds that one write of another replica takes to take in."""
    writer, reader = kind(0), kind(1)
    updates = [writer.write(number) for number in range(INGESTED)]
    return _micros(lambda: reader.take(updates), INGESTED)


def signature() -> Sample:
    """Return the microseconds of the signature check of one entry, and nothing else."""
    writer = Slots(0)
    entries = [decode_entry_untrusted(writer.write(n)) for n in range(INGESTED)]
    return _micros(lambda: [e.signature_matches() for e in entries], INGESTED)


def idle_sync(kind) -> Sample:
    """Return the bytes, both ways, of a reconciliation with nothing to say."""
    writers = [kind(number) for number in range(NUM_WRITERS)]
    one, other = writers[0], writers[1]
    updates = [writers[n % NUM_WRITERS].write(n) for n in range(1000)]
    one.take(updates)
    other.take(updates)
    return Sample(value=float(sum(one.sync(other))))


def heal(kind, seed: int) -> tuple[Sample, Sample]:
    """Return the bytes of a heal of ten replicas, and the optimum."""
    done, optimum = healed(kind, seed)
    note(f"{kind.kind}: {done.num_bytes} B, {done.seconds:.1f} virtual s")
    return Sample(value=float(done.num_bytes)), Sample(value=float(optimum))


def _child(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.store_contestants", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def restart(kind, path: Path) -> tuple[Sample, Sample]:
    """Return CPU seconds to open ENTRIES entries, and resident bytes of each."""
    found = json.loads(_child(kind.kind, "open", str(path)))
    seconds, resident = found["seconds"], int(found["resident_bytes"])
    return (
        Sample(value=seconds, cpu_seconds=seconds, peak_rss_bytes=resident),
        Sample(value=resident / ENTRIES, peak_rss_bytes=resident),
    )


def measure(rounds: int) -> Iterator[Row]:
    """Yield a row per case."""
    kinds = {name: kind for name, kind in KINDS.items() if _installed(name)}
    samples: dict[str, dict[str, list[Sample]]] = {}

    def keep(case: str, who: str, sample: Sample) -> None:
        samples.setdefault(case, {}).setdefault(who, []).append(sample)

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in kinds}
        for name, path in paths.items():
            _child(name, "write", str(path), str(ENTRIES))
        for number in range(rounds):
            note(f"round {number + 1} of {rounds}")
            keep("ingest", "signature", signature())
            for name, kind in kinds.items():
                keep("ingest", name, ingest(kind))
                keep("idle_sync_bytes", name, idle_sync(kind))
                moved, optimum = heal(kind, number)
                keep("heal_bytes", name, moved)
                if kind is Slots:
                    keep("heal_bytes", "optimum", optimum)
                seconds, memory = restart(kind, paths[name])
                keep("restart_seconds", name, seconds)
                keep("memory_per_entry", name, memory)
    yield from _rows(samples)


def _installed(name: str) -> bool:
    return name == Slots.kind or importlib.util.find_spec(name) is not None


UNITS = {
    "ingest": "us",
    "idle_sync_bytes": "B",
    "heal_bytes": "B",
    "restart_seconds": "CPU s",
    "memory_per_entry": "B",
}


def _rows(samples: dict[str, dict[str, list[Sample]]]) -> Iterator[Row]:
    for case, unit in UNITS.items():
        ours = samples[case][Slots.kind]
        for rival in ("signature", "optimum", *RIVALS):
            theirs = samples[case].get(rival, [])
            missing = "" if theirs else f"{rival} is not installed: make bench-setup"
            if theirs or rival in RIVALS:
                name = f"{case}_vs_{rival}"
                yield compare(BENCH, name, unit, rival, ours, theirs, missing)


if __name__ == "__main__":
    main(BENCH, measure)
