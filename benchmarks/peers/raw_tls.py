"""Raw threaded ``ssl`` sockets: the least that encrypts; only the server has a key."""

from __future__ import annotations

import os
import socket
import ssl
import sys
import threading
import time

from benchmarks.peers.child import Message, answer_commands, read, write
from benchmarks.peers.credentials import from_message
from fabric.bulk.tls import make_context

CHUNK = 1 << 20


def serve() -> None:
    """Serve one connection until the parent is done."""
    first = read() or {}
    context = make_context(*from_message(first), server=True)
    context.verify_mode = ssl.CERT_NONE
    listener = None
    if "fd" not in first:
        listener = socket.create_server(("127.0.0.1", 0))
    write({"port": listener.getsockname()[1]} if listener else {})

    def receive() -> None:
        raw = listener.accept()[0] if listener else socket.socket(fileno=first["fd"])
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = context.wrap_socket(raw, server_side=True)
        buffer = bytearray(CHUNK)
        while head := sock.recv(8):
            left = total = int.from_bytes(head, "big")
            while left:
                left -= sock.recv_into(buffer, min(left, CHUNK))
            sock.sendall(total.to_bytes(8, "big"))

    threading.Thread(target=receive, daemon=True).start()
    answer_commands(lambda _: {})


def dial() -> None:
    """Measure what the parent asks for."""
    first = read() or {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if "fd" in first:  # connected already, through NATs
        raw = socket.socket(fileno=first["fd"])
    else:
        raw = socket.create_connection(("127.0.0.1", first["port"]))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock = context.wrap_socket(raw)
    data = os.urandom(CHUNK)
    write({})

    def run(case: Message) -> Message:
        start = time.perf_counter()
        sock.sendall(case["bytes"].to_bytes(8, "big"))
        for _ in range(case["bytes"] // CHUNK):
            sock.sendall(data)
        received = int.from_bytes(sock.recv(8), "big")
        assert received == case["bytes"]
        rate = received / 1e6 / (time.perf_counter() - start)
        return {"value": rate, "work": received / 1e9}

    answer_commands(run)


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else dial()
    os._exit(0)
