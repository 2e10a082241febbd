"""One peer of a laboratory network: ``server`` until its input ends, or ``client``.

A ``liar`` is a server that tells everybody a forged observed address, and that it could
not dial them. A server prints its address. A client is given the addresses of servers
and prints, as JSON, what it finds out about its own reachability.
"""

import json
import sys
from functools import partial

import msgspec
import trio

from fabric.core.errors import NoRoute
from fabric.core.protobuf import delimited, encode_message
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_dialback import DialBack
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_identify import IDENTIFY_PROTOCOL, identify
from nat.multiaddr_bytes import encode_multiaddr
from nat.reachability.autonat_messages import PROTOCOL_DIAL_BACK, PROTOCOL_DIAL_REQUEST
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


class DeadEnd(DialBack):
    """Reaches nobody."""

    async def tell(self, peer, ip, port, protocol, message):
        raise NoRoute("no")


async def forge(stream):
    protocols = (PROTOCOL_DIAL_REQUEST, PROTOCOL_DIAL_BACK, IDENTIFY_PROTOCOL)
    observed = encode_multiaddr("/ip4/203.0.113.66/tcp/6666")
    names = [(3, name.encode()) for name in protocols]
    await stream.write(delimited(encode_message([*names, (4, observed)])))


async def serve(*, honest):
    async with host() as server:
        back = DialBack(HostConfig()) if honest else DeadEnd(HostConfig())
        AutonatService(server, back, CONFIG.autonat, server.counters)
        if not honest:
            server.basic.set_stream_handler(IDENTIFY_PROTOCOL, forge)
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
    if role == "client":
        trio.run(ask, rest)
    else:
        trio.run(partial(serve, honest=role == "server"))
