"""Two hosts whose dials cross: run inside a network namespace of its own, as root.

SYNs are dropped until both dials are under way, so that the retransmitted ones meet
sockets that are dialling too. Prints what the pair has afterwards, as JSON.
"""

import json
import subprocess
from pathlib import Path

import trio

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_transport import FabricTcp
from tests.net.check_host import ListGate

DROP_SYNS = "INPUT -p tcp --syn -j DROP"
SYN_SENT = "02"  # as /proc/net/tcp writes it
dials = []
dial_again = FabricTcp.dial_with_source


async def counted(self, maddr, source):
    dials.append(source)
    return await dial_again(self, maddr, source)


def host():
    config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    return open_host(config, Ed25519Signer.generate(), ListGate(), Counters())


def iptables(action):
    subprocess.run(["iptables", action, *DROP_SYNS.split()], check=True)


def dialling():
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[3] == SYN_SENT for line in lines)


async def cross():
    FabricTcp.dial_with_source = counted
    async with host() as one, host() as two:
        iptables("-A")
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, two.peer_id, two.addrs())
            nursery.start_soon(two.connect, one.peer_id, one.addrs())
            while dialling() < 2:  # noqa: ASYNC110  # the kernel tells nobody
                await trio.sleep(0.005)
            iptables("-D")
        seconds = trio.current_time() - began
        same = two.peer_id in one.connected() and one.peer_id in two.connected()
        print(json.dumps({"met": same, "again": len(dials), "seconds": seconds}))


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    trio.run(cross)
