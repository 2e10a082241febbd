"""Our bulk channel: mutual TLS of ``fabric.bulk``, frames of 8 MiB, one connection."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress

from benchmarks.peers.child import Message, answer_commands, read, write
from benchmarks.peers.credentials import from_message
from fabric.bulk.channel import BulkReceiver, BulkSender
from fabric.bulk.tls import handshake
from fabric.core.errors import Unavailable

FRAME_BYTES = 8 << 20
DATA, END = 1, 2


def serve() -> None:
    """Serve one connection until the parent is done."""
    mine, peer_der = from_message(read() or {})
    listener = socket.create_server(("127.0.0.1", 0))
    write({"port": listener.getsockname()[1]})

    def receive() -> None:
        sock, _ = listener.accept()
        tls = handshake(sock, mine, peer_der, server=True, timeout_seconds=30)
        receiver = BulkReceiver(tls, FRAME_BYTES, stall_seconds=None)
        buffer = bytearray(FRAME_BYTES)
        total = 0
        while True:
            head = receiver.receive_head()
            receiver.receive_payload(memoryview(buffer)[: head.payload_bytes])
            total += head.payload_bytes
            if head.kind == END:
                tls.sendall(total.to_bytes(8, "big"))
                total = 0

    def receive_until_closed() -> None:
        with suppress(Unavailable):
            receive()

    threading.Thread(target=receive_until_closed, daemon=True).start()
    answer_commands(lambda _: {})


def dial() -> None:
    """Measure what the parent asks for."""
    first = read() or {}
    mine, peer_der = from_message(first)
    sock = socket.create_connection(("127.0.0.1", first["port"]))
    tls = handshake(sock, mine, peer_der, server=False, timeout_seconds=30)
    sender = BulkSender(tls)
    data = os.urandom(FRAME_BYTES)
    write({})

    def run(case: Message) -> Message:
        start = time.perf_counter()
        for _ in range(case["bytes"] // FRAME_BYTES):
            sender.send(DATA, b"", data)
        sender.send(END)
        received = int.from_bytes(tls.recv(8), "big")
        assert received == case["bytes"]
        rate = received / 1e6 / (time.perf_counter() - start)
        return {"value": rate, "work": received / 1e9}

    answer_commands(run)


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else dial()
    os._exit(0)
