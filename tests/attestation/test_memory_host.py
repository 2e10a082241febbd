"""Admission through the gate that guards the host: closed before, open after."""

from contextlib import suppress

import pytest
import trio

from fabric.core.errors import RemoteRefused, Unavailable
from fabric.net.memory_host import MemoryNetwork

WORK = "/fabric/work/1"


class Hosts:
    """What a Node asks of a network: hosts that exist before their gate does."""

    def __init__(self):
        self.made = {}

    def host(self, peer):
        return self.made.setdefault(peer, Late())


class Late:
    """Stands for a host until the network made it."""

    real = None

    def __getattr__(self, name):
        return getattr(self.real, name)


async def serve_work(peer, stream):
    await stream.send_all(b"work")


async def ask(node, other):
    stream = await node.host.open_stream(other.peer, WORK)
    async with stream:
        with suppress(trio.BrokenResourceError):
            return bytes(await stream.receive_some(10))


async def test_work_is_refused_before_and_served_after(make_node, autojump_clock):
    hosts = Hosts()
    joiner, verifier = make_node(hosts), make_node(hosts)
    verifier.grants.entries.add(verifier.entry())
    async with MemoryNetwork(1).run() as network, trio.open_nursery() as nursery:
        for node in (joiner, verifier):
            node.host.real = network.host(node.signer, node.gate)
            node.host.set_handler(WORK, serve_work)
            await nursery.start(node.service.run)
        await joiner.host.connect(verifier.peer, verifier.host.addrs())

        with pytest.raises(RemoteRefused):
            await ask(joiner, verifier)
        with pytest.raises(RemoteRefused, match="not a member") as refused:
            await joiner.service.seek(verifier.peer)
        assert "fabric join TOKEN" in refused.value.next_step
        with pytest.raises(RemoteRefused):
            await ask(joiner, verifier)

        joiner.grants.credential.append(joiner.entry())
        await joiner.service.seek(verifier.peer)
        assert await ask(joiner, verifier) == b"work"
        assert await ask(verifier, joiner) == b"work"

        verifier.service.revoke(joiner.peer, "test")
        ((peer, _),) = verifier.gate.changes()
        await verifier.host.disconnect(peer)
        with pytest.raises((RemoteRefused, Unavailable)):
            await ask(joiner, verifier)
        nursery.cancel_scope.cancel()
