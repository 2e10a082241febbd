"""Stage worker: ``python -m inference.worker``, started by the daemon."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

from fabric.bulk.worker_port import WorkerPort, start_worker
from fabric.core.errors import FabricError
from inference.worker_messages import COMMANDS

if TYPE_CHECKING:
    from inference.worker.stage import StageEngine


def main() -> None:
    """Enter the sandbox, then serve until the daemon goes."""
    worker = start_worker(sys.argv[1:])
    # Only now: importing torch starts threads, which the sandbox would not cover.
    import torch

    from inference.worker.stage import StageEngine

    torch.set_num_threads(worker.limits.threads)
    engine = StageEngine(worker.port)
    threading.Thread(target=_listen, args=[worker.port, engine], daemon=True).start()
    try:
        engine.run()
    except FabricError as exc:  # the daemon reads this from our standard error
        sys.exit(f"{exc.code}: {exc.reason}")


def _listen(port: WorkerPort, engine: StageEngine) -> None:
    """Put the daemon's commands into the inbox; end the process when it is gone."""
    try:
        while True:
            frame, fds = port.receive()
            engine.put((COMMANDS.decode_untrusted(frame), fds))
    except FabricError as exc:
        sys.stderr.write(f"{exc.reason}\n")
        os._exit(1)  # the engine may be in a long step


if __name__ == "__main__":
    main()
