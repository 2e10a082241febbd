"""A daemon that starts a worker, tells its process id, and waits to be killed."""

import sys
from pathlib import Path

import trio

from fabric.net.worker_api import WorkerLimits
from fabric.net.worker_link import open_program


async def main() -> None:
    script, scratch = sys.argv[1:]
    async with open_program([script], [], WorkerLimits(scratch=Path(scratch))) as link:
        await link.send(b"up")
        await link.receive()
        print(link.pid, flush=True)
        await trio.sleep_forever()


trio.run(main)
