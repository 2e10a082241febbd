"""Lattica 1.0.21 over TCP: echo by RPC from threads, upload of a blob by stream."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time

from lattica import (  # type: ignore[import-not-found,unused-ignore]
    ConnectionHandler,
    Lattica,
    rpc_method,
    rpc_stream,
)

from benchmarks.peers.child import Message, answer_commands, read, write


class Peer(ConnectionHandler):  # type: ignore[misc,unused-ignore]
    """What the server offers; the client needs the same class for its stubs."""

    @rpc_method  # type: ignore[untyped-decorator,unused-ignore]
    def echo(self, body: bytes) -> bytes:
        """Return ``body``."""
        return body

    @rpc_stream  # type: ignore[untyped-decorator,unused-ignore]
    def upload(self, body: bytes) -> bytes:
        """Return the length of ``body``."""
        return len(body).to_bytes(8, "big")


def build(port: int, bootstraps: list[str]) -> Lattica:
    """Return a node on loopback without discovery."""
    scratch = tempfile.mkdtemp(prefix="lattica-")
    builder = (
        Lattica.builder()
        .with_listen_addrs([f"/ip4/127.0.0.1/tcp/{port}"])
        .with_mdns(False)
        .with_upnp(False)
        .with_storage_path(scratch)
        .with_dht_db_path(scratch + "/dht")
        .with_key_path(scratch)
    )
    if bootstraps:
        builder = builder.with_bootstraps(bootstraps)
    return builder.build()


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def serve() -> None:
    """Serve until the parent is done."""
    read()
    port = free_port()
    node = build(port, [])
    Peer(node)
    peer = node.peer_id()
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"
    write({"address": [address], "peer_id": peer})
    answer_commands(lambda _: {})


def dial() -> None:
    """Measure what the parent asks for."""
    server = read()
    if server is None:
        return
    node = build(free_port(), server["address"])
    stub = Peer(node).get_stub(server["peer_id"])
    deadline = time.monotonic() + 20
    while True:  # until connected
        try:
            stub.echo(b"x").result(timeout=5)
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    write({})
    answer_commands(lambda case: measure(stub, case))


def measure(stub: object, case: Message) -> Message:
    """Return calls per second and calls, or MB/s and GB of uploads."""
    body = os.urandom(case["size"])
    done = [0] * case["in_flight"]
    start = time.perf_counter()
    end = start + case["seconds"]

    def loop(i: int) -> None:
        while time.perf_counter() < end:
            if case["kind"] == "rpc":
                answer = stub.echo(body).result()  # type: ignore[attr-defined]
                assert len(answer) == len(body)
                done[i] += 1
            else:
                stub.upload(body).result()  # type: ignore[attr-defined]
                done[i] += len(body)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(len(done))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = sum(done) / (time.perf_counter() - start)
    if case["kind"] == "rpc":
        return {"value": rate, "work": sum(done)}
    return {"value": rate / 1e6, "work": sum(done) / 1e9}


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else dial()
    os._exit(0)  # its native threads do not end
