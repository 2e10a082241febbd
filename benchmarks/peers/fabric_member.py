"""A whole member of a mesh that punches, sends and receives for the benchmarks.

The node is the daemon's own, with its traversal; only the bulk service is the
benchmark's. ``python -m benchmarks.peers.fabric_member``: JSON lines, as its siblings.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

import trio
from typing_extensions import override

from benchmarks.peers.child import Message, read, usage, write
from fabric.app.config import load_node_config
from fabric.app.home import Home
from fabric.app.identity import load_or_create_identity
from fabric.app.node import Node
from fabric.app.root_key import found_mesh
from fabric.app.session import Session
from fabric.bulk.channel import BulkReceiver, BulkSender, ByteSocket
from fabric.core.errors import FabricError, NoRoute, Unavailable
from fabric.core.ids import PeerId
from fabric.net.paths_api import BulkSocket

SERVICE = "bench"
FRAME_BYTES = 8 << 20
DATA, END = 1, 2
POLL_SECONDS = 0.005
"""Between two looks at the control connections; the rival's look is as coarse."""
MAX_TIMES = 256
PUNCHED = re.compile(r"(dcutr|punch)\.done peer=\S+ ms=\S+ punch_ms=(\S+)")


def receive(sock: BulkSocket, peer: PeerId) -> None:
    """Receive until the other side closes; answer each END with the bytes so far."""
    receiver = BulkReceiver(cast(ByteSocket, sock), FRAME_BYTES, stall_seconds=None)
    buffer = bytearray(FRAME_BYTES)
    total = 0
    with suppress(Unavailable):
        while True:
            head = receiver.receive_head()
            receiver.receive_payload(memoryview(buffer)[: head.payload_bytes])
            total += head.payload_bytes
            if head.kind == END:
                sock.sendall(total.to_bytes(8, "big"))
                total = 0


def send(sock: BulkSocket, num_bytes: int) -> Message:
    """Send ``num_bytes`` and wait until the other side has them."""
    sender = BulkSender(cast(ByteSocket, sock))
    data = os.urandom(FRAME_BYTES)
    start = time.perf_counter()
    for _ in range(num_bytes // FRAME_BYTES):
        sender.send(DATA, b"", data)
    sender.send(END)
    answer = bytearray(8)
    filled = 0
    while filled < len(answer):
        count = sock.recv_into(memoryview(answer)[filled:])
        if not count:
            raise Unavailable("the receiver closed")
        filled += count
    received = int.from_bytes(answer, "big")
    assert received == num_bytes
    rate = received / 1e6 / (time.perf_counter() - start)
    return {"value": rate, "work": received / 1e9}


class PunchTimes(logging.Handler):
    """Keeps the seconds from SYNC to a connection, by plane, as the product logs them.

    Attributes:
        seconds: Of control connections ("dcutr") and data-plane sockets ("punch").
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds = {
            name: deque[float](maxlen=MAX_TIMES) for name in ("dcutr", "punch")
        }

    @override
    def emit(self, record: logging.LogRecord) -> None:
        """Take what a punch that worked says."""
        if found := PUNCHED.match(record.getMessage()):
            self.seconds[found[1]].append(float(found[2]) / 1e3)


class Contacts:
    """When the first relayed and the first direct connection with each peer was there.

    Attributes:
        seen: Monotonic seconds by peer and by "relay" or "direct".
    """

    def __init__(self, session: Session) -> None:
        self._host = session.host
        self.seen: dict[PeerId, dict[str, float]] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            for peer in self._host.connected():
                seen = self.seen.setdefault(peer, {})
                for info in self._host.connections(peer):
                    kind = "relay" if info.kind == "relay" else "direct"
                    seen.setdefault(kind, time.monotonic())
            await trio.sleep(POLL_SECONDS)


class Member:
    """Answers the parent's commands with a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._socks: dict[PeerId, BulkSocket] = {}
        self._contacts: Contacts | None = None
        self._times = PunchTimes()
        punches = logging.getLogger("nat.punch")
        punches.setLevel(logging.INFO)
        punches.addHandler(self._times)
        punches.propagate = False

    async def answer(self, command: Message) -> Message:
        """Do what ``command`` says; a refusal is an answer too."""
        try:
            return await self._do(command)
        except FabricError as exc:
            return {"error": f"{exc.code}: {exc.reason}"}

    async def _do(self, command: Message) -> Message:
        match command["do"]:
            case "usage":
                return usage()
            case "found":
                return await self._found(command["name"])
            case "join":
                await self._node.join(command["token"])
                return self._joined("")
            case "contacts":
                return self._seen(PeerId(command["peer"]))
            case "punch":
                return await self._punch(PeerId(command["peer"]), command["times"])
            case "open":
                return await self._open(PeerId(command["peer"]))
            case _:
                sock = self._socks[PeerId(command["peer"])]
                run = partial(send, sock, command["bytes"])
                return await trio.to_thread.run_sync(run)

    async def _found(self, name: str) -> Message:
        """Found a mesh; its root key is not kept."""
        request, _ = found_mesh(name, self._node.signer.peer_id)
        await self._node.mesh_init(request.name, request.root, request.grant)
        return self._joined(await self._node.invite("worker", 3600, 100))

    def _joined(self, token: str) -> Message:
        session = self._node.require_session()
        session.bulk.serve_bulk(SERVICE, receive)
        return {"peer": str(session.own), "token": token}

    def _seen(self, peer: PeerId) -> Message:
        """Return when which contact with ``peer`` was made, and SYNC to direct."""
        assert self._contacts is not None
        return {
            "seen": self._contacts.seen.get(peer, {}),
            "punches": list(self._times.seconds["dcutr"]),
        }

    async def watch(self) -> None:
        """Note contacts from the moment that there is a session."""
        while (session := self._node.session) is None:  # noqa: ASYNC110
            await trio.sleep(POLL_SECONDS)  # the node has no event for it
        self._contacts = Contacts(session)
        await self._contacts.run()

    async def _punch(self, peer: PeerId, times: int) -> Message:
        """Punch data-plane sockets, one after the other, and close them."""
        puncher = self._node.require_session().nat.service.puncher
        self._times.seconds["punch"].clear()
        failed = 0
        for _ in range(times):
            try:
                (await puncher.punch(peer)).close()
            except NoRoute:
                failed += 1
                puncher.network_changed()  # else it waits before it tries again
        return {"failed": failed, "punches": list(self._times.seconds["punch"])}

    async def _open(self, peer: PeerId) -> Message:
        """Open the bulk connection; a relayed one is a socket pair on this machine."""
        bulk = self._node.require_session().bulk
        sock = await bulk.dial_bulk(peer, SERVICE)
        if old := self._socks.pop(peer, None):
            old.close()
        self._socks[peer] = sock
        relayed = isinstance(sock, socket.socket) and sock.family == socket.AF_UNIX
        return {"relayed": relayed}


async def main() -> None:
    """Run a node until the parent is done."""
    first = read() or {}
    home = Home.find(Path(first["home"]))
    home.create()
    config = load_node_config(home, first["settings"])
    node = Node(home, config, load_or_create_identity(home.identity_file))
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        member = Member(node)
        if first["watch"]:
            nursery.start_soon(member.watch)
        write({})
        while (command := await trio.to_thread.run_sync(read)) is not None:
            write(await member.answer(command))
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
    os._exit(0)
