"""Stock py-libp2p: one stream over TCP, Noise and yamux."""

from __future__ import annotations

import os
import sys
import time

import multiaddr
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.net_stream import INetStream
from libp2p.peer.peerinfo import info_from_p2p_addr

from benchmarks.peers.child import Message, read, usage, write

PROTOCOL = TProtocol("/bench/bulk/1")
CHUNK = 1 << 20


async def read_exactly(stream: INetStream, count: int) -> bytes:
    """Return ``count`` bytes of ``stream``."""
    data = b""
    while len(data) < count:
        part = await stream.read(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


async def serve() -> None:
    """Serve until the parent is done."""
    read()
    listen = [multiaddr.Multiaddr("/ip4/127.0.0.1/tcp/0")]
    host = new_host(key_pair=create_new_key_pair(), listen_addrs=listen)

    async def receive(stream: INetStream) -> None:
        while True:
            left = total = int.from_bytes(await read_exactly(stream, 8), "big")
            while left:
                left -= len(await stream.read(min(left, CHUNK)))
            await stream.write(total.to_bytes(8, "big"))

    async with host.run(listen_addrs=listen):
        host.set_stream_handler(PROTOCOL, receive)
        write({"address": str(host.get_addrs()[0])})
        while await trio.to_thread.run_sync(read) is not None:
            write(usage())
        os._exit(0)


async def dial() -> None:
    """Measure what the parent asks for."""
    first = read() or {}
    info = info_from_p2p_addr(multiaddr.Multiaddr(first["address"]))
    host = new_host(key_pair=create_new_key_pair())
    data = os.urandom(CHUNK)
    async with host.run(listen_addrs=[]):
        await host.connect(info)
        stream = await host.new_stream(info.peer_id, [PROTOCOL])

        async def measure(case: Message) -> Message:
            start = time.perf_counter()
            await stream.write(case["bytes"].to_bytes(8, "big"))
            for _ in range(case["bytes"] // CHUNK):
                await stream.write(data)
            received = int.from_bytes(await read_exactly(stream, 8), "big")
            rate = received / 1e6 / (time.perf_counter() - start)
            return {"value": rate, "work": received / 1e9}

        write({})
        while (command := await trio.to_thread.run_sync(read)) is not None:
            write(usage() if command["do"] == "usage" else await measure(command))
        os._exit(0)


if __name__ == "__main__":
    trio.run(serve if sys.argv[1] == "serve" else dial)
