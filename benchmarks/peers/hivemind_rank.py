"""One peer of hivemind's averager, in an environment that has it.

    python -m benchmarks.peers.hivemind_rank WORLD BYTES

The first line it reads has the addresses of a peer to join, if there is one; it answers
with its own. Commands: {"times": k}; answers {"seconds": of one averaging step}.
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks.peers.child import Message, answer_commands, read, write

ROUND_SECONDS = 100.0


def main() -> None:
    """Serve."""
    world, size = int(sys.argv[1]), int(sys.argv[2])
    import hivemind
    import torch

    torch.set_num_threads(1)
    first = read() or {}
    dht = hivemind.DHT(initial_peers=first.get("join", []), start=True)
    averager = hivemind.averaging.DecentralizedAverager(
        [torch.ones(size // 4)],
        dht=dht,
        prefix="bench",
        target_group_size=world,
        min_group_size=world,
        start=True,
    )

    def run(command: Message) -> Message:
        seconds = 0.0
        for _ in range(command["times"]):
            started = time.perf_counter()
            gathered = averager.step(timeout=ROUND_SECONDS)
            seconds += time.perf_counter() - started
            if gathered is None or len(gathered) != world:
                return {"error": f"a group of {len(gathered or {})}"}
        return {"seconds": seconds / command["times"]}

    write({"join": [str(a) for a in dht.get_visible_maddrs()]})
    answer_commands(run)
    averager.shutdown()
    dht.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
