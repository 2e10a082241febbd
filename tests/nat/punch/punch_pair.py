"""Two punchers on loopback, their control plane in memory, their sockets real."""

from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from fabric.core.framing import encode_frame
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.memory_host import MemoryNetwork
from fabric.net.offers import OBSERVE_LABEL, format_address
from nat.punch.config import PunchConfig
from nat.punch.exchange_service import Surroundings
from nat.punch.facts import UNKNOWN
from nat.punch.service import TcpPuncher
from tests.net.check_host import ListGate


async def observe(stream):
    """Answer as a data-plane listener does; who hangs up early is nobody's fault."""
    with suppress(trio.BrokenResourceError):
        await tell_address(stream)


async def tell_address(stream):
    label = b""
    while len(label) < len(OBSERVE_LABEL):
        part = await stream.receive_some(len(OBSERVE_LABEL) - len(label))
        if not part:
            return
        label += part
    assert label == OBSERVE_LABEL
    address = format_address(*stream.socket.getpeername()[:2])
    await stream.send_all(encode_frame(address.encode()))
    with trio.move_on_after(10):
        await stream.receive_some(1)


class End:
    """One puncher and what was handed to it."""

    def __init__(self, host, observers, config, facts, listeners):
        self.host = host
        self.peer = host.peer_id
        self.counters = Counters()
        send, self.accepted = trio.open_memory_channel(64)
        self._send = send
        self.facts, self.listeners = facts, listeners
        around = Surroundings(
            observers=lambda: observers,
            local_ips=lambda: (),
            facts=lambda: self.facts,
            listeners=lambda: self.listeners,
        )
        self.puncher = TcpPuncher(host, config, around, self.accept, self.counters)

    async def accept(self, sock, _seconds):
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        try:
            await self._send.send(stream)
            await trio.Event().wait()
        finally:
            stream.socket.close()


@asynccontextmanager
async def pair(config=None, facts=(UNKNOWN, UNKNOWN), listeners=((), ()), ears=2):
    """Yield two ends, connected with each other, that see themselves on loopback."""
    config = config or PunchConfig(bulk_sockets=0)
    async with MemoryNetwork(1).run() as network, trio.open_nursery() as nursery:
        serving = [
            await nursery.start(partial(trio.serve_tcp, observe, 0, host="127.0.0.1"))
            for _ in range(ears)
        ]
        observers = tuple(
            f"127.0.0.1:{listeners[0].socket.getsockname()[1]}" for listeners in serving
        )
        ends = []
        for number in (0, 1):
            signer = Ed25519Signer((number + 1).to_bytes(32, "big"))
            host = network.host(signer, ListGate())
            end = End(host, observers, config, facts[number], listeners[number])
            await nursery.start(end.puncher.run)
            ends.append(end)
        one, two = ends
        await one.host.connect(two.peer, two.host.addrs())
        yield one, two
        nursery.cancel_scope.cancel()
