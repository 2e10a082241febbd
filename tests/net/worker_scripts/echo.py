"""A worker that obeys: echo, write to a descriptor, spin, die, flood its log."""

import os
import sys
import threading

from fabric.bulk.worker_port import start_worker

worker = start_worker(sys.argv[1:])
port = worker.port
while True:
    frame, fds = port.receive()
    if frame == b"modules":
        found = {
            name
            for name in ("trio", "libp2p", "torch")
            if sys.modules.get(name) is not None
        }
        port.send(",".join(sorted(found)).encode())
    elif frame == b"environment":
        port.send(",".join(sorted(os.environ)).encode())
    elif frame == b"args":
        port.send(repr(worker.args).encode())
    elif frame == b"write":
        os.write(fds[0], b"from the worker")
        os.close(fds[0])
        port.send(b"written")
    elif frame == b"hang":
        threading.Event().wait()
    elif frame == b"die":
        sys.exit("no reason to live")
    elif frame == b"flood":
        sys.stderr.write("x" * (3 << 20))
        sys.stderr.flush()
        port.send(b"flooded")
    else:
        port.send(frame)
