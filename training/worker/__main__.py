"""A training worker: ``python -m training.worker``, started by the daemon only.

The sandbox stands before torch is imported: importing it starts threads.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from fabric.bulk.certificates import make_worker_key
from fabric.bulk.worker_port import StartedWorker, WorkerPort, start_worker
from fabric.core.errors import FabricError, RemoteProtocolError, Unavailable
from training.messages import (
    COMMAND,
    EVENT,
    Configure,
    Event,
    Failed,
    WorkerReady,
)

if TYPE_CHECKING:
    from training.worker.inbox import Inbox


def main() -> int:
    """Serve one job; return the exit status."""
    started = start_worker(sys.argv[1:])
    key_pem, public_key = make_worker_key()
    _tell(started.port, _ready(started, public_key))
    try:
        _serve(started, key_pem)
    except FabricError as exc:
        may_restart = isinstance(exc, Unavailable)
        _tell(started.port, Failed(exc.code, exc.reason[:500], may_restart))
        return exc.exit_code
    return 0


def keep_trio_out() -> None:
    """Let no library import trio: no process holds both trio and torch.

    An HTTP client that a library brings along takes trio where it is installed and does
    without where the import fails, which None makes it do.
    """
    sys.modules.setdefault("trio", None)  # type: ignore[arg-type]  # documented use


def _serve(started: StartedWorker, key_pem: bytes) -> None:
    port = started.port
    frame, _ = port.receive()
    configure = COMMAND.decode_untrusted(frame)
    if not isinstance(configure, Configure):
        raise RemoteProtocolError("the first command is Configure")

    keep_trio_out()
    import torch

    from training.worker.inbox import INBOX_ITEMS, Inbox
    from training.worker.participant import Participant

    torch.set_num_threads(started.limits.threads)
    torch.use_deterministic_algorithms(True)
    inbox = Inbox(INBOX_ITEMS)
    participant = Participant(
        inbox, lambda event: _tell(port, event), configure, key_pem
    )
    threading.Thread(target=_listen, args=(port, inbox), daemon=True).start()
    participant.run()


def _listen(port: WorkerPort, inbox: Inbox) -> None:
    """Put each command into the inbox until the daemon is gone."""
    from training.worker.inbox import Commanded, DaemonGone

    while True:
        try:
            frame, fds = port.receive()
            inbox.put(Commanded(COMMAND.decode_untrusted(frame), fds))
        except (Unavailable, RemoteProtocolError):
            inbox.put(DaemonGone())
            return


def _ready(started: StartedWorker, public_key: bytes) -> WorkerReady:
    report = started.report
    lacking = tuple(f"{lack.feature}: {lack.reason}"[:500] for lack in report.lacking)
    return WorkerReady(public_key, report.enforced, lacking)


def _tell(port: WorkerPort, event: Event) -> None:
    port.send(EVENT.encode(event))


if __name__ == "__main__":
    sys.exit(main())
