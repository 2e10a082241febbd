"""One end of an upgrade test: a real libp2p host whose first connection is a pipe.

    python dcutr_host.py dial|serve NAME PEER MEET_IP OBSERVER..

``serve`` waits at the meeting point of ``punch_host.py``, ``dial`` is joined with it:
that is the "circuit". Prints the kinds of its connections and how long the first that
needs no circuit took.
"""

import hashlib
import json
import logging
import sys

import trio

from fabric.core.framing import FrameReader
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.offers import OBSERVE_LABEL, parse_address_untrusted
from fabric.net.ports import ALLOWED
from fabric.net.traversal_api import ConnectionInfo
from nat.multiaddr_bytes import tcp_multiaddr
from nat.punch.config import PunchConfig
from nat.punch.dcutr_round_service import ControlSurroundings
from nat.punch.dcutr_service import DcutrService
from nat.punch.port_service import bound_socket, family_of

MEET_PORT = 7000
CONTROL_PORT = 4801


def signer(name):
    return Ed25519Signer(hashlib.sha256(name.encode()).digest())


class Open:
    def allows(self, peer, protocol):
        return ALLOWED


async def observed(observers):
    """Return the control port's addresses; the connections stay open."""
    found, kept = [], []
    for text in observers:
        target = parse_address_untrusted(text)
        sock = bound_socket(family_of(target[0]), CONTROL_PORT)
        await sock.connect(target)
        await sock.send(OBSERVE_LABEL)
        reader = FrameReader(max_bytes=64)
        frames = []
        while not frames:
            frames += reader.feed(await sock.recv(64))
        found.append(tcp_multiaddr(*parse_address_untrusted(frames[0].decode())))
        kept.append(sock)
    return tuple(dict.fromkeys(found)), kept


async def circuit(role, name, peer, ip):
    stream = await trio.open_tcp_stream(ip, MEET_PORT)
    if role == "dial":
        await stream.send_all(f"OPEN {name} {peer}\n".encode())
        return stream
    await stream.send_all(f"LISTEN {name}\n".encode())
    line = b""
    while not line.endswith(b"\n"):
        line += await stream.receive_some(1)
    return stream


async def main(role, name, peer, ip, *observers):
    other = signer(peer).peer_id
    listen = (f"/ip4/0.0.0.0/tcp/{CONTROL_PORT}",)
    async with open_host(
        HostConfig(listen=listen), signer(name), Open(), Counters()
    ) as host:
        addrs, _kept = await observed(observers)
        around = ControlSurroundings(
            port=lambda: CONTROL_PORT,
            observed=lambda: addrs,
            local_ips=lambda: (),
            announced=lambda _: (),
        )
        config = PunchConfig(relay_grace_seconds=0.5, dcutr_attempts=1)
        service = DcutrService(host, config, around, Counters())
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            print(json.dumps({"ready": True}), flush=True)
            pipe = await circuit(role, name, peer, ip)
            info = ConnectionInfo(kind="relay", outbound=role == "dial")
            await host.adopt(other, pipe, info)
            began = trio.current_time()
            with trio.move_on_after(8):
                while all(c.kind == "relay" for c in host.connections(other)):  # noqa: ASYNC110
                    await trio.sleep(0.002)
            took = trio.current_time() - began
            best = host.connections(other)[0]
            answer = {"kind": best.kind, "outbound": best.outbound, "ms": took * 1e3}
            answer["reason"] = service.reason(other)
            print(json.dumps(answer), flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trio.run(main, *sys.argv[1:])
