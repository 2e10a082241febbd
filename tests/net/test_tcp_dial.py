"""Dialling whatever answers first: silence, refusals, and a second choice."""

import socket
from contextlib import ExitStack

import pytest
import trio

from fabric.core.errors import NoRoute
from fabric.net import tcp_dial
from fabric.net.tcp_dial import connect_any


@pytest.fixture
def listening():
    """Return a function that opens a listener and gives its address."""
    with ExitStack() as stack:

        def listen(backlog=8):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            sock.listen(backlog)
            return sock.getsockname()

        yield listen


@pytest.fixture
def silent(listening):
    """Return an address that drops every SYN: its queue is full and nobody accepts."""
    address = listening(backlog=0)
    with ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(address)
        yield address


@pytest.fixture
def refused():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and does not listen
        yield sock.getsockname()


async def peer_of(targets, second=()):
    sock = await connect_any(targets, second)
    try:
        return sock.getpeername()
    finally:
        sock.close()


async def test_the_second_choice_waits_for_the_first(listening, monkeypatch):
    monkeypatch.setattr(tcp_dial, "SECOND_AFTER_SECONDS", 5.0)
    first, second = listening(), listening()
    for _ in range(5):  # nobody accepts, and the queue holds eight
        assert await peer_of([first], [second]) == first


async def test_refusals_bring_the_second_choice_at_once(
    listening, refused, monkeypatch
):
    monkeypatch.setattr(tcp_dial, "SECOND_AFTER_SECONDS", 5.0)
    second, started = listening(), trio.current_time()
    assert await peer_of([refused], [second]) == second
    assert await peer_of([], [second]) == second
    assert trio.current_time() - started < tcp_dial.SECOND_AFTER_SECONDS


@pytest.mark.slow
async def test_silence_brings_the_second_choice_soon(listening, silent):
    second = listening()
    with trio.fail_after(tcp_dial.SECOND_AFTER_SECONDS + 1):
        assert await peer_of([silent], [second]) == second


@pytest.mark.slow
async def test_silence_ends_with_its_reason(silent, refused, monkeypatch):
    monkeypatch.setattr(tcp_dial, "CONNECT_SECONDS", 0.3)
    with trio.fail_after(2), pytest.raises(NoRoute) as info:
        await connect_any([silent, refused])
    assert "no answer within 0.3 s" in info.value.reason
    assert "refused" in info.value.reason
