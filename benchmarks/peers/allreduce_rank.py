"""One rank: all-reduces of one size, over gloo and over the fabric backend.

    python -m benchmarks.peers.allreduce_rank RANK WORLD MASTER_IP PORT OWN_IP KINDS

Commands: {"kind": one of KINDS, "bytes": n, "times": k}; answers {"seconds": of one
all-reduce}. All ranks get each command. KINDS, with commas, are the groups to make:
gloo, local, tls, tcp, measured (TLS that chooses by its links); or an algorithm's name.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import training.worker.backend.register  # noqa: F401 - makes the backend known
from benchmarks.peers.child import Message, answer_commands, write
from training.worker.backend.options import FabricOptions

_SIOCGIFADDR = 0x8915
LIMIT = timedelta(seconds=100)


def interface_of(ip: str) -> str:
    """Return the name of the interface that has ``ip``: gloo asks for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == ip:
                return name
    raise ValueError(f"no interface has {ip}")


def main() -> None:
    """Serve."""
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    master, port, ip, kinds = sys.argv[3], int(sys.argv[4]), sys.argv[5], sys.argv[6]
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(ip)
    torch.set_num_threads(1)
    store = dist.TCPStore(master, port, world, rank == 0)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=LIMIT
    )
    options = {
        "local": FabricOptions(ip=ip),
        "tls": FabricOptions(ip=ip, same_host=False),
        "measured": FabricOptions(ip=ip, same_host=False, measure=True),
        "tcp": FabricOptions(ip=ip, same_host=False, tls=False),
    }
    groups = {
        kind: dist.group.WORLD
        if kind == "gloo"
        else dist.new_group(
            backend="fabric",
            pg_options=options.get(kind)
            or FabricOptions(ip=ip, same_host=False, algorithm=kind),
            timeout=LIMIT,
        )
        for kind in kinds.split(",")
    }

    def run(command: Message) -> Message:
        group = groups[command["kind"]]
        tensor = torch.ones(command["bytes"] // 4)
        dist.all_reduce(tensor, group=group)
        seconds = 0.0
        for _ in range(command["times"]):
            tensor.fill_(1.0)
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            seconds += time.perf_counter() - started
        if not bool((tensor == world).all()):
            return {"error": "the sum is wrong"}
        return {"seconds": seconds / command["times"]}

    write({"ready": True})
    answer_commands(run)
    os._exit(0)  # ranks end one by one; a goodbye would wait for the others


if __name__ == "__main__":
    main()
