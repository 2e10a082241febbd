"""One peer of a laboratory network: ``server`` until its input ends, or ``client``.

A server prints its address. A client is given the addresses of servers and prints, as
JSON, what it finds out about its own reachability.
"""

import json
import sys
from functools import partial

import msgspec
import trio

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_dialback import DialBack
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_identify import identify
from nat.reachability.autonat_service import AutonatService
from nat.reachability.config import AutonatConfig, ReachabilityConfig
from nat.reachability.netwatch_service import open_netwatch
from nat.reachability.service import Surroundings, open_reachability
from tests.net.check_host import ListGate

CONFIG = ReachabilityConfig(autonat=AutonatConfig(dial_seconds=2.0))
PORT = 4801


def host():
    config = HostConfig(listen=(f"/ip4/0.0.0.0/tcp/{PORT}",))
    return open_host(config, Ed25519Signer.generate(), ListGate(), Counters())


async def serve():
    async with host() as server:
        AutonatService(server, DialBack(HostConfig()), CONFIG.autonat, server.counters)
        print(next(a for a in server.addrs() if "127.0.0.1" not in a), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


async def ask(addrs):
    async with host() as client, open_netwatch(client.counters) as network:
        for addr in addrs:
            await client.connect(addr.rsplit("/", 1)[1], [addr])
        around = Surroundings(lambda: tuple(network.view().addresses))
        began = trio.current_time()
        async with open_reachability(
            client, partial(identify, client), around, CONFIG, client.counters
        ) as service:
            async for verdict in service.changes():
                if verdict.status != "unknown":
                    break
            seconds = trio.current_time() - began
            found = msgspec.to_builtins(verdict) | {"seconds": seconds}
            print(json.dumps(found))


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    trio.run(serve) if role == "server" else trio.run(ask, rest)
