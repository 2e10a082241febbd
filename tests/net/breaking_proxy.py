"""A TCP proxy that breaks connections at a chosen byte, in a chosen way."""

import socket
import struct
from contextlib import asynccontextmanager
from functools import partial

import trio

NEVER = 1 << 60


class BreakingProxy:
    """Forwards to ``target``; ``fault`` applies to each connection from then on."""

    def __init__(self, target):
        self.target = target
        self.port = 0
        self.heal()

    def heal(self):
        """Break nothing from now on."""
        self.fault("forth", NEVER, "reset")

    def fault(self, direction, after_bytes, kind):
        """Break after ``after_bytes`` that go "forth" (from the dialler) or "back".

        Args:
            direction: Of the bytes that are counted.
            after_bytes: Let through before.
            kind: "reset" both ends, "end" both in order, or "flip" one bit and go on.
        """
        self.direction, self.after, self.kind = direction, after_bytes, kind
        self.counts = {"forth": 0, "back": 0}

    async def serve(self, near):
        try:
            far = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            await trio.aclose_forcefully(near)
            return
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            nursery.start_soon(self.pump, near, far, "forth", scope)
            nursery.start_soon(self.pump, far, near, "back", scope)

    async def pump(self, source, sink, direction, scope):
        count = 0
        try:
            while data := await source.receive_some(65536):
                self.counts[direction] = max(self.counts[direction], count + len(data))
                left = self.after - count
                if direction == self.direction and left < len(data):
                    if self.kind != "flip":
                        await sink.send_all(data[:left])
                        break
                    if left >= 0:
                        bad = bytearray(data)
                        bad[left] ^= 0x20
                        data = bad
                count += len(data)
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()
        for stream in (source, sink):
            if direction == self.direction and self.kind == "reset":
                linger = struct.pack("ii", 1, 0)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            stream.socket.close()


@asynccontextmanager
async def breaking_proxy(target):
    """Run a :class:`BreakingProxy` towards a port of this machine."""
    proxy = BreakingProxy(target)
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        proxy.port = listeners[0].socket.getsockname()[1]
        yield proxy
        nursery.cancel_scope.cancel()
