"""Our RPC: the real service and dispatch over mutual TLS, msgspec messages."""

from __future__ import annotations

import socket
import sys
from collections.abc import Collection
from typing import Annotated

import msgspec
import trio

from benchmarks.peers.child import Message, read, usage, write
from benchmarks.peers.credentials import from_message
from fabric.bulk.certificates import Credentials
from fabric.bulk.tls import make_context
from fabric.core.codec import Codec
from fabric.core.ids import PeerId
from fabric.core.telemetry import Counters
from fabric.net.data_config import RpcConfig
from fabric.net.ports import ALLOWED, Decision, PathKind
from fabric.net.rpc import open_rpc
from fabric.net.rpc_api import MAX_RPC_BYTES, Rpc
from fabric.net.socket_options import set_liveness
from fabric.net.tls_stream import secure

SERVER, CLIENT = PeerId("server"), PeerId("client")


class Echo(msgspec.Struct, frozen=True, tag="echo"):
    """Request and response."""

    number: int
    body: Annotated[bytes, msgspec.Meta(max_length=MAX_RPC_BYTES)]


CODEC: Codec[Echo] = Codec(Echo, max_bytes=MAX_RPC_BYTES)


class OpenGate:
    """Allows everything."""

    def allows(self, peer: PeerId, protocol: str) -> Decision:
        """Return yes."""
        return ALLOWED


def echo(_peer: PeerId, request: bytes) -> bytes:
    """Decode, answer, encode."""
    message = CODEC.decode_untrusted(request)
    return CODEC.encode(Echo(message.number + 1, message.body))


class Dialler:
    """Connects to the one server."""

    def __init__(self, port: int, mine: Credentials, peer_der: bytes) -> None:
        self._port, self._mine, self._peer_der = port, mine, peer_der

    async def connect(
        self, peer: PeerId, kinds: Collection[PathKind]
    ) -> tuple[trio.abc.Stream, PathKind]:
        """Return an authenticated stream."""
        raw = await trio.open_tcp_stream("127.0.0.1", self._port)
        sock = socket.socket(fileno=raw.socket.detach())
        set_liveness(sock, patient=True)
        context = make_context(self._mine, self._peer_der, server=False)
        return await secure(sock, context, self._peer_der, server=False), "direct"


async def serve() -> None:
    """Serve until the parent is done."""
    mine, peer_der = from_message(read() or {})
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    write({"port": listener.socket.getsockname()[1]})
    config = RpcConfig()
    dialler = Dialler(0, mine, peer_der)
    async with open_rpc(config, SERVER, dialler, OpenGate(), Counters()) as rpc:
        rpc.register("bench.echo", echo)
        raw = await listener.accept()
        context = make_context(mine, peer_der, server=True)
        sock = socket.socket(fileno=raw.socket.detach())
        set_liveness(sock, patient=True)
        await rpc.accept(CLIENT, await secure(sock, context, peer_der, server=True))
        while await trio.to_thread.run_sync(read) is not None:
            write(usage())
        await listener.aclose()


async def dial() -> None:
    """Measure what the parent asks for."""
    first = read() or {}
    dialler = Dialler(first["port"], *from_message(first))
    config = RpcConfig()
    async with open_rpc(config, CLIENT, dialler, OpenGate(), Counters()) as rpc:
        await call(rpc, b"")
        write({})
        while (command := await trio.to_thread.run_sync(read)) is not None:
            if command["do"] == "usage":
                write(usage())
            else:
                write(await measure(rpc, command))


async def call(rpc: Rpc, body: bytes) -> None:
    """Make one checked call."""
    request = CODEC.encode(Echo(1, body))
    answer = CODEC.decode_untrusted(await rpc.call(SERVER, "bench.echo", request))
    assert answer.number == 2
    assert len(answer.body) == len(body)


async def measure(rpc: Rpc, case: Message) -> Message:
    """Return calls per second with ``in_flight`` tasks, and their number."""
    body = bytes(case["size"])
    done = 0
    start = trio.current_time()
    end = start + case["seconds"]

    async def loop() -> None:
        nonlocal done
        while trio.current_time() < end:
            await call(rpc, body)
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(case["in_flight"]):
            nursery.start_soon(loop)
    return {"value": done / (trio.current_time() - start), "work": done}


if __name__ == "__main__":
    trio.run(serve if sys.argv[1] == "serve" else dial)
