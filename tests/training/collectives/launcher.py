"""Runs torch programs as ranks that are forked from one process: torch loads once.

Reads JSON lines {"script", "world", "arguments", "killed", "seconds"}; answers each
with {"results": {rank: its last JSON line}, "failed": {rank: what it said}}. Ranks in
"killed" end by a signal of their own, or are killed when the others have ended.
"""

import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
import warnings

import torch
import torch.distributed
import torch.distributed.fsdp

import training.worker.backend.register  # noqa: F401

warnings.simplefilter("ignore")  # torch renames its collectives


def child(case, rank, port, out):
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(case["world"]),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    sys.argv = [case["script"], *map(str, case["arguments"])]
    status = 1
    try:
        torch.set_num_threads(1)
        runpy.run_path(case["script"], run_name="__main__")
        status = 0
    except (Exception, SystemExit):  # noqa: BLE001 - said below, and in the status
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def run(case):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    pids, pipes = {}, {}
    sys.stdout.flush()
    for rank in range(case["world"]):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            child(case, rank, port, writer)
        os.close(writer)
        pids[rank], pipes[reader] = pid, rank
    killed = set(case["killed"])
    said = dict.fromkeys(pids, b"")
    ends = time.monotonic() + case["seconds"]
    waiting = set(pids) - killed
    while waiting and time.monotonic() < ends:
        readable, _, _ = select.select(list(pipes), [], [], 0.5)
        for reader in readable:
            data = os.read(reader, 1 << 16)
            said[pipes[reader]] += data
            if not data:
                waiting.discard(pipes.pop(reader))
                os.close(reader)
    failed = {}
    for rank, pid in pids.items():
        if rank in waiting or rank in killed:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if rank not in killed and status:
            failed[rank] = f"status {status}: {said[rank].decode()[-3000:]}"
    for reader in pipes:
        os.close(reader)
    results = {}
    for rank, text in said.items():
        lines = [x for x in text.decode().splitlines() if x.startswith("{")]
        if lines:
            results[rank] = json.loads(lines[-1])
    return {"results": results, "failed": failed}


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
os._exit(0)  # torch takes its time to unload
