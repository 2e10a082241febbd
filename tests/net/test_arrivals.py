"""What arrives at the data plane without an offer: observation, punched sockets."""

import errno
import socket

import pytest
import trio

from fabric.core.errors import ConfigError
from fabric.core.framing import FrameReader
from fabric.core.telemetry import BUGS, DROPPED, Counters
from fabric.net.arrivals import HANDED_OVER, Arrivals
from fabric.net.data_config import DataConfig
from fabric.net.offers import OBSERVE_LABEL


class Desk:
    """Knows one label; keeps what it is given."""

    def __init__(self):
        self.taken = []

    def claim(self, label, sock):
        if label == b"b" * 16:
            sock.close()
            raise RuntimeError("a bug of ours")
        if label != b"n" * 16:
            return False
        self.taken.append((label, "claimed"))
        sock.close()
        return True

    def redeem(self, label):
        return label

    async def take(self, offer, sock, kind):
        self.taken.append((offer, kind))
        sock.close()


@pytest.fixture
async def arrivals():
    async with trio.open_nursery() as nursery:
        made = Arrivals(DataConfig(), Desk(), counters := Counters())
        made.counted = counters.snapshot
        bound = trio.Event()
        nursery.start_soon(made.listen, bound.set)
        with trio.fail_after(5):
            await bound.wait()
            yield made
        nursery.cancel_scope.cancel()


async def test_an_observer_says_where_a_connection_comes_from(arrivals):
    stream = await trio.open_tcp_stream(*arrivals.bound[0])
    await stream.send_all(OBSERVE_LABEL)
    reader = FrameReader(max_bytes=100)
    frames = []
    while not frames:
        frames = list(reader.feed(await stream.receive_some()))
    host, port = stream.socket.getsockname()
    assert frames[0].decode() == f"{host}:{port}"
    assert arrivals.observed == 1
    await stream.aclose()
    while arrivals.observed:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("kind", ["punched", "relay"])
async def test_a_socket_that_others_brought_is_served_by_its_label(arrivals, kind):
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ours.sendall(b"l" * 16)
    await arrivals.serve(theirs, kind, 1.0)
    assert arrivals._desk.taken == [(b"l" * 16, kind)]
    ours.close()


async def test_the_nonce_of_a_punch_is_claimed(arrivals):
    stream = await trio.open_tcp_stream(*arrivals.bound[0])
    await stream.send_all(b"n" * 16)
    assert await stream.receive_some() == b""
    assert arrivals._desk.taken == [(b"n" * 16, "claimed")]
    await stream.aclose()


async def test_a_relayed_connection_cannot_be_observed(arrivals):
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ours.sendall(OBSERVE_LABEL)
    await arrivals.serve(theirs, "relay", 1.0)
    assert ours.recv(1) == b""
    assert arrivals._counters.snapshot()["protocol_errors_total:data"] == 1
    ours.close()


async def test_a_spare_that_stays_silent_ends_at_its_own_deadline(arrivals):
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    await arrivals.serve(theirs, "punched", 0.01)
    assert ours.recv(1) == b""
    assert arrivals.pending == 0
    ours.close()


async def test_a_bug_of_ours_ends_one_connection_and_not_the_daemon(arrivals):
    stream = await trio.open_tcp_stream(*arrivals.bound[0])
    await stream.send_all(b"b" * 16)
    assert await stream.receive_some() == b""
    await stream.aclose()
    assert arrivals.counted()[BUGS] == 1
    await test_an_observer_says_where_a_connection_comes_from(arrivals)


async def test_more_than_fits_is_dropped_where_another_listener_hands_over(arrivals):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        dials = [socket.create_connection(address) for _ in range(HANDED_OVER + 2)]
        pairs = [(dial, server.accept()[0]) for dial in dials]
    # no task runs in between, but one is waiting for the first
    for _, theirs in pairs:
        theirs.setblocking(False)
        arrivals.take(theirs)
    pairs[-1][0].settimeout(1)
    assert pairs[-1][0].recv(1) == b""
    assert arrivals.counted()[f"{DROPPED}:pending_connections"] == 1
    for ours, _ in pairs:
        ours.close()


async def listen_on(listen):
    """Return what is bound for ``listen``."""
    made = Arrivals(DataConfig(listen=listen), Desk(), Counters())
    ready = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.listen, ready.set)
        with trio.fail_after(5):
            await ready.wait()
        nursery.cancel_scope.cancel()
    return made.bound


async def test_several_addresses_share_a_port():
    (one, port), (two, same) = await listen_on("127.0.0.1:0,127.0.0.2:0")
    assert (one, two) == ("127.0.0.1", "127.0.0.2")
    assert port == same


async def test_a_machine_without_ipv6_listens_on_the_rest(monkeypatch):
    open_real = trio.open_tcp_listeners

    async def without_ipv6(port, *, host):
        if ":" in host:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6 here")
        return await open_real(port, host=host)

    monkeypatch.setattr(trio, "open_tcp_listeners", without_ipv6)
    assert [ip for ip, _ in await listen_on("127.0.0.1:0,[::]:0")] == ["127.0.0.1"]
    for asked_for in ("[::]:0", "127.0.0.1:0,[::1]:0"):
        with pytest.RaisesGroup(ConfigError):
            await listen_on(asked_for)
