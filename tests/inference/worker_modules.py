"""Import what the stage worker imports, in its order; report the stacks it holds."""

import sys

from fabric.bulk.worker_port import start_worker

worker = start_worker(sys.argv[1:])
import inference.worker.__main__  # noqa: E402
import inference.worker.stage  # noqa: E402, F401

stacks = ("libp2p", "torch", "transformers", "trio")
found = [name for name in stacks if sys.modules.get(name) is not None]
worker.port.send(",".join(found).encode())
worker.port.receive()
