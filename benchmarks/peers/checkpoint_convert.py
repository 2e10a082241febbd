"""Convert one DCP checkpoint into one .pt file, by ours, torch's tool, or a plain copy.

    python -m benchmarks.peers.checkpoint_convert ours|dcp|raw SOURCE TARGET

Prints seconds, CPU seconds, and the memory above what the imports took.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

COPY_BYTES = 8 << 20


def ours() -> Callable[[Path, Path], object]:
    """Return our converter, imported."""
    from checkpoints.conversion import convert
    from checkpoints.conversion_plan import ConvertOptions
    from checkpoints.formats.registry import sink_of

    sink_of("torch")
    return lambda source, target: convert(source, target, ConvertOptions(to="torch"))


def dcp() -> Callable[[Path, Path], object]:
    """Return torch's tool, imported."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    return dcp_to_torch_save


def raw() -> Callable[[Path, Path], object]:
    """Return a copy of all bytes, synced: the least a conversion can be."""

    def copy(source: Path, target: Path) -> None:
        with target.open("wb", buffering=0) as out:
            for file in sorted(source.iterdir()):
                with file.open("rb", buffering=0) as opened:
                    while window := opened.read(COPY_BYTES):
                        out.write(window)
            os.fsync(out.fileno())

    return copy


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    """Run one conversion."""
    how, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    run = {"ours": ours, "dcp": dcp, "raw": raw}[how]()
    before, cpu, start = peak(), time.process_time(), time.perf_counter()
    run(source, target)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "cpu": time.process_time() - cpu,
                "extra": peak() - before,
                "peak": peak(),
            }
        )
    )


if __name__ == "__main__":
    main()
