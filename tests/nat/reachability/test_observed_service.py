from functools import partial

import pytest
import trio

from fabric.core.errors import NoRoute, RemoteProtocolError
from fabric.core.framing import encode_frame
from fabric.net.offers import OBSERVE_LABEL, format_address
from fabric.net.port_reuse import connect, listen_shared
from nat.reachability.observed_service import observe_from


async def listener(nursery, answer=None):
    """A data-plane listener as far as observing goes; returns its address."""

    async def serve(stream):
        if await stream.receive_some(16) != OBSERVE_LABEL:
            return
        seen = format_address(*stream.socket.getpeername()[:2]).encode()
        await stream.send_all(encode_frame(seen) if answer is None else answer)

    (opened,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
    return "127.0.0.1", opened.socket.getsockname()[1]


async def test_a_listener_tells_where_the_shared_port_is_seen():
    async with trio.open_nursery() as nursery, listen_shared("127.0.0.1", 0) as own:
        port = own.socket.getsockname()[1]
        target = await listener(nursery)
        with trio.fail_after(5):
            seen = await observe_from(port, target)
            assert seen.observed == seen.local == f"127.0.0.1:{port}"
            assert seen.observer_ip == "127.0.0.1"
            again = await observe_from(port, target)  # nothing is in the way
            assert again.observed == seen.observed
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "answer", [b"", encode_frame(b"nonsense"), b"\xff" * 64, encode_frame(b"1" * 200)]
)
async def test_a_malformed_answer_is_the_listeners_fault(answer):
    async with trio.open_nursery() as nursery, listen_shared("127.0.0.1", 0) as own:
        target = await listener(nursery, answer)
        with trio.fail_after(5), pytest.raises(RemoteProtocolError):
            await observe_from(own.socket.getsockname()[1], target)
        nursery.cancel_scope.cancel()


async def test_a_connection_that_is_there_already_is_not_observed_from_elsewhere():
    async with trio.open_nursery() as nursery, listen_shared("127.0.0.1", 0) as own:
        target = await listener(nursery)
        port = own.socket.getsockname()[1]
        async with await connect(*target, ("127.0.0.1", port)):
            with trio.fail_after(5), pytest.raises(NoRoute):
                await observe_from(port, target)
        nursery.cancel_scope.cancel()


async def test_nobody_there_is_no_route():
    async with listen_shared("127.0.0.1", 0) as own:
        with trio.fail_after(5), pytest.raises(NoRoute, match="refused"):
            await observe_from(own.socket.getsockname()[1], ("127.0.0.1", 1))
