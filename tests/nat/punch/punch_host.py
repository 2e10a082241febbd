"""Processes of the punch tests: a meeting point with observers, and the two ends.

    python punch_host.py meet IP OBSERVER..            (observers are "ip:port")
    python punch_host.py serve NAME MEET_IP OBSERVER..
    python punch_host.py punch NAME MEET_IP OBSERVER..
        (reads "punch PEER", "spoof PEER ADDRESS..", "quit")

A stream between two ends is a TCP connection of each with the meeting point, which
pumps; so signalling crosses the NATs as over a relay.
"""

import json
import logging
import sys
import time
from contextlib import suppress
from functools import partial

import trio

from fabric.core.errors import FabricError
from fabric.core.framing import FrameReader, encode_frame
from fabric.core.telemetry import Counters
from fabric.net.offers import OBSERVE_LABEL, format_address, parse_address_untrusted
from nat.punch.config import PunchConfig
from nat.punch.exchange_service import Surroundings
from nat.punch.facts import UNKNOWN
from nat.punch.messages import PROTOCOL_PUNCH, PUNCH, PunchConnect, PunchSync
from nat.punch.service import TcpPuncher

MEET_PORT = 7000


async def read_line(stream):
    line = b""
    while not line.endswith(b"\n"):
        part = await stream.receive_some(1)
        if not part:
            raise trio.BrokenResourceError("ended")
        line += part
    return line.decode().split()


async def pump(source, sink):
    try:
        while data := await source.receive_some(65536):
            await sink.send_all(data)
        await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await trio.aclose_forcefully(sink)


class Meeting:
    def __init__(self):
        self.waiting = {}

    def queue(self, name):
        return self.waiting.setdefault(name, trio.open_memory_channel(64))

    async def serve(self, stream):
        verb, name, *rest = await read_line(stream)
        if verb == "LISTEN":
            done = trio.Event()
            await self.queue(name)[0].send((stream, done))
            await done.wait()
            return
        other, done = await self.queue(rest[0])[1].receive()
        try:
            await other.send_all(f"{name}\n".encode())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump, stream, other)
                nursery.start_soon(pump, other, stream)
        finally:
            done.set()


async def observe(stream):
    label = b""
    while len(label) < 16:
        label += await stream.receive_some(16 - len(label)) or b"?" * 16
    if label == OBSERVE_LABEL:
        host, port = stream.socket.getpeername()
        await stream.send_all(encode_frame(format_address(host, port).encode()))
        with trio.move_on_after(10):
            await stream.receive_some(1)


def guarded(handler):
    async def guard(stream):
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            await handler(stream)

    return guard


async def meet(ip, observers):
    meeting = Meeting()
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(trio.serve_tcp, guarded(meeting.serve), MEET_PORT, host=ip)
        )
        for text in observers:
            host, port = parse_address_untrusted(text)
            await nursery.start(
                partial(trio.serve_tcp, guarded(observe), port, host=host)
            )
        print(json.dumps({"ready": True}), flush=True)


class MeetingHost:
    """As much of a Host as the puncher needs."""

    def __init__(self, name, ip):
        self.name, self.ip = name, ip
        self.handlers = {}
        self.ready = None

    def set_handler(self, protocol, handler):
        self.handlers[protocol] = handler

    def events(self):
        return trio.open_memory_channel(1)[1]

    async def prepare(self):
        """Connect beforehand: a stream of a daemon is no new connection either."""
        if self.ready is None:
            self.ready = await trio.open_tcp_stream(self.ip, MEET_PORT)

    async def open_stream(self, peer, protocol):
        await self.prepare()
        stream, self.ready = self.ready, None
        await stream.send_all(f"OPEN {self.name} {peer}\n".encode())
        return stream

    async def serve(self, protocol):
        async with trio.open_nursery() as nursery:
            while True:
                stream = await trio.open_tcp_stream(self.ip, MEET_PORT)
                await stream.send_all(f"LISTEN {self.name}\n".encode())
                try:
                    peer = (await read_line(stream))[0]
                except trio.BrokenResourceError:
                    return  # the meeting point ended first
                nursery.start_soon(self.handle, protocol, peer, stream)

    async def handle(self, protocol, peer, stream):
        await self.handlers[protocol](peer, stream)
        await trio.aclose_forcefully(stream)


async def echo(sock, _seconds):
    with trio.move_on_after(60):
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
            while data := await stream.receive_some(65536):
                await stream.send_all(data)


async def spoof(host, peer, addresses):
    """Name somebody else's addresses in a CONNECT, and wait for the end of the race."""
    stream = await host.open_stream(peer, PROTOCOL_PUNCH)
    connect = PunchConnect(nonce=bytes(16), addresses=tuple(addresses))
    await stream.send_all(encode_frame(PUNCH.encode(connect)))
    reader = FrameReader(max_bytes=PUNCH.max_bytes)
    answers = []
    while not answers:
        answers += reader.feed(await stream.receive_some(4096))
    await stream.send_all(encode_frame(PUNCH.encode(PunchSync())))
    with trio.move_on_after(10):
        while await stream.receive_some():
            pass
    answer = PUNCH.decode_untrusted(answers[0])
    print(json.dumps({"connect": isinstance(answer, PunchConnect)}), flush=True)


async def commands(host, puncher):
    lines = trio.wrap_file(sys.stdin)
    async for line in lines:
        verb, *rest = line.split()
        if verb == "quit":
            return
        if verb == "spoof":
            await spoof(host, rest[0], rest[1:])
            continue
        await host.prepare()
        began = time.perf_counter()
        try:
            sock = await puncher.punch(rest[0])
            took = time.perf_counter() - began
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            with trio.fail_after(5):
                await stream.send_all(b"hello through the wall")
                said = b""
                while len(said) < 22:
                    said += await stream.receive_some(100)
            peer = stream.socket.getpeername()
            await stream.aclose()
            answer = {"ok": True, "ms": took * 1e3, "peer": list(peer)}
        except FabricError as exc:
            took = time.perf_counter() - began
            answer = {"ok": False, "code": exc.code, "reason": exc.reason}
            answer["ms"] = took * 1e3
        print(json.dumps(answer), flush=True)


async def end(role, name, ip, observers):
    host = MeetingHost(name, ip)
    around = Surroundings(
        observers=lambda: observers,
        local_ips=lambda: (),
        facts=lambda: UNKNOWN,
        listeners=lambda: (),
    )
    config = PunchConfig(bulk_sockets=0, retry_seconds=(0.0,), inbound_burst=100)
    puncher = TcpPuncher(host, config, around, echo, Counters())
    async with trio.open_nursery() as nursery:
        await nursery.start(puncher.run)
        nursery.start_soon(host.serve, "/fabric/punch/1")
        print(json.dumps({"ready": True}), flush=True)
        if role == "punch":
            await commands(host, puncher)
            nursery.cancel_scope.cancel()


def main():
    logging.basicConfig(level=logging.WARNING)
    role, *rest = sys.argv[1:]
    if role == "meet":
        trio.run(meet, rest[0], rest[1:])
    else:
        trio.run(end, role, rest[0], rest[1], rest[2:])


if __name__ == "__main__":
    main()
