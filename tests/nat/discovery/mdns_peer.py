"""One peer on a network: announces ADDRESS for MESH, prints each address it hears."""

import sys

import trio

from fabric.core.ids import MeshId, peer_id_of
from nat.discovery.config import DiscoveryConfig
from nat.discovery.mdns_service import MdnsService


async def main(seed, mesh, *ips):
    own = peer_id_of(seed.encode() * 32)
    addrs = [f"/ip4/{ip}/tcp/4801/p2p/{own}" for ip in ips]

    def learn(found):
        for known in found.values():
            print(*known, flush=True)

    service = MdnsService(
        own,
        MeshId(mesh),
        DiscoveryConfig(mdns_poll_seconds=1),
        lambda: addrs,
        learn,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        await trio.to_thread.run_sync(sys.stdin.read)
        print(service.report().state, flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
