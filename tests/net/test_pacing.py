"""The registry on real sockets: paced within 5 %, measured, cut, and let go."""

import array
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import trio

from fabric.core.errors import ResourceExhausted
from fabric.net.ack_watch import SILENT_SECONDS, AckWatch
from fabric.net.budget_config import BudgetConfig
from fabric.net.pacing import DOUBT_SECONDS, TRAVEL_SECONDS, SocketRegistry
from fabric.net.socket_options import set_liveness
from fabric.net.tcp_info import TcpInfo, tcp_info
from tests.net.shaped_link import needs_namespaces, veth_link

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="pacing and TCP_INFO are Linux's"
)
MB = 1e6


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    return left, right


class Drain:
    """Reads a socket in a thread and counts."""

    def __init__(self, sock):
        self.count = 0
        self.ended = threading.Event()
        threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, sock):
        buffer = bytearray(1 << 18)
        try:
            while count := sock.recv_into(buffer):
                self.count += count
        except OSError:
            pass
        self.ended.set()


def send_in_thread(sock):
    def run():
        try:
            while True:
                sock.sendall(bytes(65536))
        except OSError:
            pass

    threading.Thread(target=run, daemon=True).start()


@contextmanager
def closed(*socks):
    try:
        yield
    finally:
        for sock in socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


async def measured(registry, drains, seconds=2.5):
    """Return bytes per second of each drain while the registry looks."""
    counts, started = [], 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.run)
        await until_elapsed(1.0)
        started, counts = time.monotonic(), [drain.count for drain in drains]
        await until_elapsed(seconds)
        took = time.monotonic() - started
        rates = [
            (drain.count - count) / took
            for drain, count in zip(drains, counts, strict=True)
        ]
        nursery.cancel_scope.cancel()
    return rates


async def until_elapsed(seconds):
    """Return after real time: what is measured is a rate."""
    with trio.move_on_after(seconds):
        await trio.sleep_forever()


async def loopback_or_veth_holds(pairs, rate):
    registry = SocketRegistry(BudgetConfig(max_up_bytes_per_second=rate))
    drains = []
    with closed(*(sock for pair in pairs for sock in pair)):
        for number, (left, right) in enumerate(pairs):
            registry.add(left, f"peer{number}", "direct")
            drains.append(Drain(right))
            send_in_thread(left)
        rates = await measured(registry, drains)
    assert 0.95 * rate <= sum(rates) <= 1.05 * rate, rates
    assert min(rates) >= 0.85 * max(rates), rates


@pytest.mark.slow
@pytest.mark.parametrize("rate", [5 * MB, 40 * MB])
async def test_total_budget_holds_on_loopback(rate):
    await loopback_or_veth_holds([tcp_pair(), tcp_pair()], rate)


class TestVeth:
    pytestmark = needs_namespaces

    @pytest.mark.parametrize("rate", [1.25 * MB, 6.25 * MB, 25 * MB])
    async def test_total_budget_holds_on_veth(self, rate):
        with veth_link() as link:
            await loopback_or_veth_holds([link.pair(), link.pair()], rate)

    async def test_a_silent_machine_is_cut_and_a_slow_reader_is_not(self):
        registry = SocketRegistry(BudgetConfig())
        with veth_link() as link:
            slow, silent = link.pair(), link.pair()
            slow_near = tcp_pair()  # the other link goes dark with the namespace
            with closed(*slow, *silent, *slow_near):
                for sock in (slow_near[0], silent[0]):
                    set_liveness(sock)  # the registry makes it a patient one
                    registry.add(sock, "peer", "direct")
                    send_in_thread(sock)
                reader = Drain(silent[1])
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(registry.run)
                    await until_elapsed(0.5)
                    assert reader.count > 0
                    link.black_hole()
                    with trio.fail_after(9.0):
                        while len(registry._handles) > 1:
                            await until_elapsed(0.1)
                    nursery.cancel_scope.cancel()
                assert tcp_info(slow_near[0]).state == 1
                assert tcp_info(silent[0]).state != 1

    @pytest.mark.parametrize("sends", [True, False])
    async def test_a_doubted_path_is_found_dead_soon_and_a_live_one_stays(self, sends):
        registry = SocketRegistry(BudgetConfig())
        with veth_link() as link:
            dead, near = link.pair(), tcp_pair()
            with closed(*dead, *near):
                for sock in (dead[0], near[0]):
                    registry.add(sock, "peer", "direct")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(registry.run)
                    link.black_hole()
                    if sends:
                        send_in_thread(dead[0])
                    registry.doubt("peer", trio.current_time())
                    with trio.fail_after(4.0):
                        while tcp_info(dead[0]).state == 1:
                            await until_elapsed(0.1)
                    nursery.cancel_scope.cancel()
                assert tcp_info(near[0]).state == 1


def test_a_doubt_passes():
    registry = SocketRegistry(BudgetConfig())
    pair = tcp_pair()

    def keepalive():
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPCNT)
        return [pair[0].getsockopt(socket.IPPROTO_TCP, name) for name in names]

    with closed(*pair):
        registry.add(pair[0], "peer", "direct")
        usual = keepalive()
        registry.doubt("peer", 0.0)
        assert keepalive() < usual
        registry.look(DOUBT_SECONDS - 0.1)
        assert keepalive() < usual
        registry.look(DOUBT_SECONDS)
        assert keepalive() == usual


@pytest.mark.slow
async def test_budget_per_peer_holds_and_the_rest_is_free():
    config = BudgetConfig(max_up_bytes_per_second_per_peer=10 * MB)
    registry = SocketRegistry(config)
    pairs = [tcp_pair() for _ in range(3)]
    with closed(*(sock for pair in pairs for sock in pair)):
        drains = []
        for peer, (left, right) in zip("AAB", pairs, strict=True):
            registry.add(left, peer, "direct")
            drains.append(Drain(right))
            send_in_thread(left)
        one, two, other = await measured(registry, drains)
    assert one + two == pytest.approx(10 * MB, rel=0.05)
    assert other == pytest.approx(10 * MB, rel=0.05)


SENDER = """
import array, socket, sys
port = socket.socket(fileno=int(sys.argv[1]))
_, rights, _, _ = port.recvmsg(1, socket.CMSG_LEN(4))
fds = array.array("i"); fds.frombytes(rights[0][2])
sock = socket.socket(fileno=fds[0])
while True:
    sock.sendall(bytes(65536))
"""


@contextmanager
def process_that_sends(sock):
    """Hand ``sock`` to another process, which fills it."""
    ours, theirs = socket.socketpair()
    arguments = [sys.executable, "-c", SENDER, str(theirs.fileno())]
    child = subprocess.Popen(arguments, pass_fds=[theirs.fileno()])
    try:
        with ours, theirs:
            rights = array.array("i", [sock.fileno()]).tobytes()
            ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            sock.close()
            yield child
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
async def test_a_worker_is_paced_cut_and_let_go_when_killed():
    registry = SocketRegistry(BudgetConfig(max_up_bytes_per_second=8 * MB))
    left, right = tcp_pair()
    drain = Drain(right)
    registry.add(left, "peer", "direct", leaves=True)
    with process_that_sends(left) as child, closed(right):
        (rate,) = await measured(registry, [drain])
        assert rate == pytest.approx(8 * MB, rel=0.05)
        assert not registry._handles  # the registry ended, the connection did not
        assert not drain.ended.is_set()
        child.kill()
        assert drain.ended.wait(5)


@pytest.mark.slow
async def test_rates_change_while_a_worker_sends_and_death_is_told():
    registry = SocketRegistry(BudgetConfig(max_up_bytes_per_second=8 * MB))
    left, right = tcp_pair()
    drain = Drain(right)
    registry.add(left, "peer", "direct", leaves=True)
    with process_that_sends(left) as child, closed(right):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(registry.run)
            await until_elapsed(1.0)
            registry.config = BudgetConfig(max_up_bytes_per_second=20 * MB)
            await until_elapsed(1.0)
            started, count = time.monotonic(), drain.count
            await until_elapsed(2.0)
            rate = (drain.count - count) / (time.monotonic() - started)
            assert rate == pytest.approx(20 * MB, rel=0.05)
            traffic = registry.traffic()["peer"]
            assert traffic.up_bytes_per_second == pytest.approx(20 * MB, rel=0.15)
            assert traffic.connections == {"direct": 1}
            child.kill()
            with trio.fail_after(2):
                await trio.to_thread.run_sync(drain.ended.wait)
            assert not registry._handles
            nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_gate_that_changes_cuts_the_sockets_of_workers_at_once():
    registry = SocketRegistry(BudgetConfig())
    left, right = tcp_pair()
    other, far = tcp_pair()
    drain = Drain(right)
    registry.add(left, "revoked", "direct", leaves=True)
    registry.add(other, "member", "direct")
    with process_that_sends(left), closed(right, other, far):
        assert registry.shut_down("revoked") == 1
        assert drain.ended.wait(2)
        assert set(registry.traffic()) == {"member"}
        other.sendall(b"still there")
        assert far.recv(100) == b"still there"


def test_a_closed_socket_leaves_the_books_and_its_number_may_be_reused():
    registry = SocketRegistry(BudgetConfig(max_connections_per_peer=1))
    left, right = tcp_pair()
    handle = registry.add(left, "peer", "direct")
    with pytest.raises(ResourceExhausted):
        registry.add(right, "peer", "direct")
    number = left.fileno()
    left.close()
    assert right.recv(1) == b""  # no copy of ours keeps the connection
    stranger, end = socket.socketpair()
    assert number in (stranger.fileno(), end.fileno())
    with right, stranger, end:
        assert registry.shut_down("peer") == 0
        stranger.sendall(b"ok")
        assert end.recv(2) == b"ok"
    handle.release()
    handle.release()


def test_a_socket_no_worker_took_is_let_go_after_its_travel_time():
    registry = SocketRegistry(BudgetConfig())
    left, right = tcp_pair()
    registry.add(left, "peer", "direct", leaves=True)
    registry.look(0.0)
    left.close()
    for now in (1.0, TRAVEL_SECONDS - 1):
        registry.look(now)
        assert registry._handles
    registry.look(TRAVEL_SECONDS + 2)
    assert not registry._handles
    assert right.recv(1) == b""
    right.close()


def test_unix_sockets_are_counted_and_cut_but_not_paced():
    registry = SocketRegistry(BudgetConfig(max_up_bytes_per_second=1 * MB))
    left, right = socket.socketpair()
    registry.add(left, "peer", "relay")
    registry.look(1.0)
    assert registry.traffic()["peer"].connections == {"relay": 1}
    assert registry.shut_down("peer") == 1
    assert right.recv(1) == b""
    left.close()
    right.close()


def info(**fields):
    values = dict.fromkeys(TcpInfo.__struct_fields__, 0)
    return TcpInfo(**{**values, "state": 1, **fields})


def test_silence_is_death_only_while_something_waits():
    watch = AckWatch()
    assert not watch.dead(info(last_ack_milliseconds=60_000), 0.0)
    # it spoke long ago, but has been asked only now
    assert not watch.dead(info(unacked=3, last_ack_milliseconds=61_000), 1.0)
    assert not watch.dead(info(unacked=3, last_ack_milliseconds=66_900), 6.9)
    assert watch.dead(info(unacked=3, last_ack_milliseconds=67_000), 7.0)


def test_an_acknowledgement_of_anything_starts_the_wait_anew():
    watch = AckWatch()
    heard = info(unacked=9, last_ack_milliseconds=900)
    for second in range(60):
        assert not watch.dead(heard, float(second))
    slow = info(
        probes=1, last_ack_milliseconds=50_000
    )  # no room there: probes answered
    assert not watch.dead(slow, 61.0)
    gone = info(probes=2, last_ack_milliseconds=50_000)
    assert not watch.dead(gone, 62.0)
    assert watch.dead(gone, 62.0 + SILENT_SECONDS)


def test_the_layout_of_tcp_info_is_the_kernels():
    left, right = tcp_pair()
    with left, right:
        left.sendall(b"x" * 1000)
        assert right.recv(1000, socket.MSG_WAITALL)
        raw = left.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        seen = tcp_info(left)
    assert seen.state == raw[0] == 1
    assert 1000 <= seen.bytes_acked <= 1001
    assert 0 < seen.rtt_microseconds < 1_000_000
    assert seen.min_rtt_microseconds <= seen.rtt_microseconds * 2
    assert struct.unpack_from("=I", raw, 68)[0] == seen.rtt_microseconds
