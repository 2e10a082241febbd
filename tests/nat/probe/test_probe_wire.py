"""Probes over real links: estimates within 25 %, bytes bounded, liars refused."""

import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.errors import (
    FabricError,
    PeerTimeout,
    RemoteProtocolError,
    Unavailable,
)
from nat.probe.config import ProbeConfig
from nat.probe.estimate import estimate, is_stable, quantise
from nat.probe.wire import Exchange
from tests.net.shaped_link import needs_namespaces, veth_link

CONFIG = ProbeConfig(deadline_seconds=5.0)


def run_probe(left, right, *, rtt=0.001, may_wait=lambda: 0.0, config=CONFIG):
    """Return (asker's rates or error, answerer's rates, bytes each sent)."""
    with left, right, ThreadPoolExecutor(1) as pool:
        server, client = Exchange(right, config), Exchange(left, config)
        answered = pool.submit(server.answer, may_wait, rtt)
        try:
            rates = client.ask(rtt)
        except FabricError as exc:
            rates = exc
        return rates, answered.result(10), (client.sent_bytes, server.sent_bytes)


@pytest.mark.parametrize("mbit", [10, 50, 200])
class TestShaped:
    pytestmark = needs_namespaces

    def test_estimates_are_within_a_quarter(self, mbit):
        want = mbit * 1e6 / 8
        with veth_link() as link:
            link.shape("a", want)
            link.shape("b", want / 2)
            (up, down), answered, sent = run_probe(*link.pair())
        # the shaper counts frame and TCP headers: 66 of 1514 bytes
        assert up == pytest.approx(want, rel=0.25)
        assert down == pytest.approx(want / 2, rel=0.25)
        assert answered == pytest.approx((down, up), rel=0.25)
        assert max(sent) <= CONFIG.max_probe_bytes + 100
        # what the time limit lets through, and what the kernels hold
        assert sent[0] <= want * CONFIG.max_probe_seconds * 1.5 + 600_000


def test_a_probe_on_a_fast_link_stays_below_its_bytes():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    rates, answered, sent = run_probe(left, right)
    assert rates.up > 20e6
    assert rates.down > 20e6
    assert answered.up > 0
    assert answered.down > 0
    assert max(sent) <= CONFIG.max_probe_bytes + 100


def test_a_probe_works_over_a_relays_socket_pair():
    rates, answered, _ = run_probe(*socket.socketpair())
    assert rates.up > 0
    assert answered.up > 0
    assert answered.down > 0


def test_who_asks_too_often_is_told_to_wait_and_gets_no_bytes():
    refused, answered, sent = run_probe(*socket.socketpair(), may_wait=lambda: 30.0)
    assert isinstance(refused, Unavailable)
    assert refused.code == "E_BUSY"
    assert "31 s" in refused.reason
    assert answered is None
    assert sent[1] == 5


def hostile(script, run, config=CONFIG):
    """Run ``script`` as the peer of ``run(exchange)``: (error, bytes we sent)."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        exchange = Exchange(ours, config)
        done = pool.submit(run, exchange)
        script(theirs)
        theirs.close()
        return done.exception(10), exchange.sent_bytes


def serve(exchange):
    try:
        return exchange.answer(lambda: 0.0, 0.001)
    finally:
        exchange._sock.shutdown(socket.SHUT_RDWR)


def test_a_request_for_gigabytes_gets_no_more_than_the_bound():
    def ask_much(sock):
        sock.sendall(struct.pack(">4sII", b"FPB1", 2**32 - 1, 2**32 - 1))
        sock.sendall(struct.pack(">I", 0))  # our burst: nothing
        sock.settimeout(5)
        total = 0
        while total < CONFIG.max_probe_bytes // 2:
            total += len(sock.recv(1 << 20))
        sock.sendall(struct.pack(">Q", 1))
        while count := len(sock.recv(1 << 20)):
            total += count
        assert total <= CONFIG.max_probe_bytes + 100

    error, sent = hostile(ask_much, serve)
    assert error is None
    assert sent <= CONFIG.max_probe_bytes + 100


def test_a_burst_beyond_its_bound_and_long_chunks_are_refused():
    piece = struct.pack(">I", 16_000) + bytes(16_000)

    def flood(sock):
        sock.sendall(struct.pack(">4sII", b"FPB1", 100_000, 0))
        try:
            for _ in range(1000):
                sock.sendall(piece)
        except OSError:
            return

    def lie(sock):
        sock.sendall(struct.pack(">4sII", b"FPB1", 2**21, 0))
        sock.sendall(struct.pack(">I", 2**32 - 1))
        sock.recv(100)

    for script in (flood, lie):
        error, _ = hostile(script, serve)
        assert isinstance(error, RemoteProtocolError)


@pytest.mark.slow
def test_a_peer_that_trickles_ends_at_the_deadline():
    config = ProbeConfig(deadline_seconds=0.5)
    error, _ = hostile(lambda sock: sock.recv(1), lambda e: e.ask(0.0), config)
    assert isinstance(error, Unavailable | RemoteProtocolError | OSError)

    def trickle(sock):
        ended, byte = b"?", b"\0"
        sock.settimeout(0.05)
        while ended:
            try:
                sock.sendall(byte)
                ended = sock.recv(1)
            except TimeoutError:
                continue
            except OSError:
                return

    def run(exchange):
        try:
            exchange._fill(memoryview(bytearray(1000)))
        finally:
            exchange._sock.shutdown(socket.SHUT_RDWR)

    error, _ = hostile(trickle, run, config)
    assert isinstance(error, PeerTimeout | TimeoutError)


@settings(max_examples=60)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_of_the_peer_end_in_an_error_or_rates(data, asking):
    def speak(sock):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(1)
        try:
            while sock.recv(1 << 20):
                pass
        except OSError:
            return

    def run(exchange):
        try:
            return exchange.ask(0.0) if asking else serve(exchange)
        finally:
            exchange._sock.shutdown(socket.SHUT_RDWR)

    config = ProbeConfig(max_probe_bytes=1 << 16, deadline_seconds=2.0)
    error, sent = hostile(speak, run, config)
    assert error is None or isinstance(error, FabricError | OSError)
    assert sent <= (1 << 16) + 100


def burst(rates, window=0.02, piece=16_384):
    """Return arrivals of a burst whose windows carry ``rates`` bytes per second."""
    arrivals, now, total = [], 0.0, 0
    for rate in rates:
        for _ in range(max(1, int(rate * window / piece))):
            now += piece / rate
            total += piece
            arrivals.append((now, total))
    return arrivals


def test_slow_start_and_stalls_that_are_made_up_for_do_not_count():
    slow_start = [1e6, 2e6, 4e6]
    steady = [1e7] * 12
    arrivals = burst(slow_start + steady)
    assert estimate(arrivals) == pytest.approx(1e7, rel=0.05)
    middle = len(arrivals) // 2
    until = arrivals[middle][0] + 0.02  # a hole: what follows is held back
    held = [
        (max(t, until) if n > middle else t, b) for n, (t, b) in enumerate(arrivals)
    ]
    assert estimate(held) == pytest.approx(1e7, rel=0.05)
    assert is_stable(burst(steady))
    assert not is_stable(burst([1e6, 2e6, 4e6, 8e6, 16e6]))
    assert not is_stable(burst([1e6]))


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 65536)), max_size=200),
)
def test_any_arrivals_have_a_finite_estimate(steps):
    now, total, arrivals = 0.0, 0, []
    for wait, count in steps:
        now, total = now + wait, total + count
        arrivals.append((now, total))
    assert 0 <= estimate(arrivals) < float("inf")


@given(st.floats(1e-4, 1e12), st.floats(0.95, 1.05))
def test_steps_are_near_and_hold_against_noise(value, noise):
    step = quantise(value)
    assert step == pytest.approx(value, rel=0.051)
    assert quantise(value * noise, step) == pytest.approx(step, rel=0.11)
    assert quantise(step * noise, step) == step
    assert quantise(step * 1.3, step) > step
