"""The contract of ``fabric.net.host.Host``, run against every implementation."""

import resource
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio

from fabric.core.errors import IntegrityError, NoRoute, RemoteRefused, Unavailable
from fabric.core.ids import peer_id_of
from fabric.core.telemetry import BUGS, PROTOCOL_ERRORS, REFUSALS
from fabric.net.host import PeerConnected, PeerDisconnected
from fabric.net.ports import ALLOWED, Decision

ECHO = "/fabric/echo/1"
BINDING = "/fabric/binding/1"
SECONDS = 5


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class ListGate:
    """Admits whatever is not on its list."""

    def __init__(self) -> None:
        self.refused: set[tuple[str, str]] = set()

    def allows(self, peer, protocol):
        if (peer, protocol) in self.refused:
            return Decision(False, "E_NOT_ADMITTED", "not admitted", "attest first")
        return ALLOWED


async def echo(peer, stream):
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


async def receive_all(stream):
    parts = [part async for part in stream]
    return b"".join(parts)


async def bindings(one, two):
    """Open a stream from ``one``; return what each end says its connection is."""

    async def tell(peer, stream):
        await stream.send_all(two.channel_binding(peer, stream))

    two.set_handler(BINDING, tell)
    async with await one.open_stream(two.peer_id, BINDING) as stream:
        return one.channel_binding(two.peer_id, stream), await receive_all(stream)


MakePair = Callable[[], AbstractAsyncContextManager[tuple[Any, Any]]]
"""Yields two hosts of one network whose gates are ``ListGate``."""


async def check_host(make_pair: MakePair) -> None:
    """Assert the whole contract."""
    for check in (
        check_connect,
        check_no_route,
        check_wrong_peer,
        check_streams,
        check_close,
        check_refusal,
        check_handler_errors,
        check_break,
    ):
        with trio.fail_after(4 * SECONDS):
            async with make_pair() as (one, two):
                await check(one, two)


async def check_connect(one, two):
    events = two.events()
    assert one.peer_id != two.peer_id
    assert all(addr.endswith(f"/p2p/{one.peer_id}") for addr in one.addrs())
    assert one.connected() == frozenset()
    await one.connect(two.peer_id, two.addrs())
    await one.connect(two.peer_id, ())  # already there
    with trio.fail_after(SECONDS):
        assert await events.receive() == PeerConnected(one.peer_id)
    assert one.connected() == {two.peer_id}
    assert two.connected() == {one.peer_id}
    binding, theirs = await bindings(one, two)
    assert len(binding) == 32
    assert binding == theirs
    assert await bindings(two, one) == (binding, binding)
    await one.disconnect(two.peer_id)
    with trio.fail_after(SECONDS):
        event = await events.receive()
    assert isinstance(event, PeerDisconnected)
    assert event.peer == one.peer_id
    assert one.connected() == two.connected() == frozenset()
    await two.connect(one.peer_id, one.addrs())
    assert binding not in await bindings(two, one)


async def check_no_route(one, two):
    stranger = peer_id_of(bytes(32))
    with pytest.raises(NoRoute) as none:
        await one.connect(stranger, ())
    assert none.value.code == "E_NO_ROUTE"
    addr = two.addrs()[0].replace(two.peer_id, stranger)
    bad = [f"{addr}/bad", "nonsense"]
    with pytest.raises(NoRoute) as error:
        await one.connect(stranger, bad)
    assert all(addr in error.value.reason for addr in bad)
    assert error.value.next_step
    # a good address among bad ones is found
    await one.connect(two.peer_id, [*bad, *two.addrs()])


async def check_wrong_peer(one, two):
    stranger = peer_id_of(bytes(32))
    bare = [addr.rpartition("/p2p/")[0] for addr in two.addrs()]
    with pytest.raises(IntegrityError):
        await one.connect(stranger, bare)
    assert one.connected() == frozenset()


async def check_streams(one, two):
    seen = []

    async def serve(peer, stream):
        seen.append(peer)
        await echo(peer, stream)

    two.set_handler(ECHO, serve)
    with pytest.raises(Unavailable):
        await one.open_stream(two.peer_id, ECHO)
    await one.connect(two.peer_id, two.addrs())
    with pytest.raises(RemoteRefused):
        await one.open_stream(two.peer_id, "/fabric/unknown/1")
    blob = bytes(range(256)) * 8192  # 2 MiB: several windows
    stream = await one.open_stream(two.peer_id, ECHO)

    async def send():
        await stream.send_all(blob)
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await receive_all(stream) == blob
    await stream.aclose()
    assert seen == [one.peer_id]
    # many at once, the other way round
    one.set_handler(ECHO, echo)

    async def ask(number):
        async with await two.open_stream(one.peer_id, ECHO) as mine:
            await mine.send_all(b"%d" % number)
            await mine.send_eof()
            assert await receive_all(mine) == b"%d" % number

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(ask, number)


async def check_close(one, two):
    """What was sent before ``aclose`` arrives; what comes after is refused."""
    broken, got = trio.Event(), []

    async def serve(peer, stream):
        got.append(await receive_all(stream))
        try:
            while True:
                await stream.send_all(bytes(65536))
        except trio.BrokenResourceError:
            broken.set()

    two.set_handler(ECHO, serve)
    await one.connect(two.peer_id, two.addrs())
    stream = await one.open_stream(two.peer_id, ECHO)
    await stream.send_all(b"last words")
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some(1)
    with trio.fail_after(SECONDS):
        await broken.wait()
    assert got == [b"last words"]


async def check_refusal(one, two):
    two.set_handler(ECHO, echo)
    two.gate.refused.add((one.peer_id, ECHO))
    await one.connect(two.peer_id, two.addrs())
    with pytest.raises(RemoteRefused):
        await one.open_stream(two.peer_id, ECHO)
    assert two.counters.snapshot()[f"{REFUSALS}:E_NOT_ADMITTED"] == 1
    two.gate.refused.clear()
    async with await one.open_stream(two.peer_id, ECHO) as stream:
        await stream.send_all(b"now")
        assert await stream.receive_some(3) == b"now"


async def check_handler_errors(one, two):
    """A handler that raises loses its stream, nothing else."""

    async def bug(peer, stream):
        raise KeyError("bug")

    async def complain(peer, stream):
        raise IntegrityError("bad bytes")

    two.set_handler("/fabric/bug/1", bug)
    two.set_handler("/fabric/complain/1", complain)
    two.set_handler(ECHO, echo)
    await one.connect(two.peer_id, two.addrs())
    for protocol in ("/fabric/bug/1", "/fabric/complain/1"):
        stream = await one.open_stream(two.peer_id, protocol)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        await stream.aclose()
    counted = two.counters.snapshot()
    assert counted[BUGS] == 1
    assert counted[f"{PROTOCOL_ERRORS}:E_INTEGRITY"] == 1
    async with await one.open_stream(two.peer_id, ECHO) as stream:
        await stream.send_all(b"fine")
        assert await stream.receive_some(4) == b"fine"
    with pytest.raises(ValueError, match="start with"):
        two.set_handler("other/1", echo)


async def check_break(one, two):
    """A connection that ends breaks its streams on both sides."""
    broken = trio.Event()

    async def serve(peer, stream):
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        broken.set()

    two.set_handler(ECHO, serve)
    await one.connect(two.peer_id, two.addrs())
    stream = await one.open_stream(two.peer_id, ECHO)
    await one.disconnect(two.peer_id)
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some(1)
    with trio.fail_after(SECONDS):
        await broken.wait()
    with pytest.raises(Unavailable):
        await one.open_stream(two.peer_id, ECHO)
    await stream.aclose()
