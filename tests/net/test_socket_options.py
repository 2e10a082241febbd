"""Liveness: a black hole ends calls within 8 s, a slow reader ends nothing."""

import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fabric.net.socket_options import (
    DEAD_AFTER_SECONDS,
    USER_TIMEOUT_MILLISECONDS,
    set_liveness,
)
from tests.net.shaped_link import needs_namespaces, veth_link


def timed(function):
    """Return (seconds until it raised, the error)."""
    started = time.monotonic()
    with pytest.raises(OSError) as caught:  # noqa: PT011, any
        function()
    return time.monotonic() - started, caught.value


def send_for_ever(sock):
    while True:
        sock.sendall(bytes(65536))


def test_unix_sockets_are_left_alone():
    left, right = socket.socketpair()
    with left, right:
        set_liveness(left)


@pytest.mark.skipif(sys.platform != "linux", reason="reads options back as on Linux")
def test_options_are_set_and_inherited_by_accepted_sockets():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        set_liveness(listener)
        with socket.create_connection(listener.getsockname()) as dialled:
            set_liveness(dialled, patient=True)
            accepted, _ = listener.accept()
            with accepted:
                for sock, timeout in (
                    (dialled, 0),
                    (accepted, USER_TIMEOUT_MILLISECONDS),
                ):
                    level = socket.IPPROTO_TCP
                    assert sock.getsockopt(level, socket.TCP_NODELAY)
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    assert sock.getsockopt(level, socket.TCP_KEEPIDLE) == 3
                    assert sock.getsockopt(level, socket.TCP_USER_TIMEOUT) == timeout


class TestBlackHole:
    pytestmark = needs_namespaces

    def test_blocked_sender_and_idle_readers_end_in_time(self):
        with veth_link() as link, ThreadPoolExecutor(3) as pool:
            sender, idle, patient = (link.pair() for _ in range(3))
            for sock in (*sender, *idle):
                set_liveness(sock)
            for sock in patient:
                set_liveness(sock, patient=True)
            link.black_hole()
            ends = [
                pool.submit(timed, lambda: send_for_ever(sender[0])),
                pool.submit(timed, lambda: idle[1].recv(1)),
                pool.submit(timed, lambda: patient[1].recv(1)),
            ]
            seconds = [end.result(20)[0] for end in ends]
            for sock in (*sender, *idle, *patient):
                sock.close()
        assert all(3 < took < DEAD_AFTER_SECONDS for took in seconds), seconds

    def test_a_peer_that_does_not_read_is_not_dead_for_a_patient_socket(self):
        with veth_link() as link, ThreadPoolExecutor(2) as pool:
            pairs = {patient: link.pair() for patient in (False, True)}
            ends = {}
            for patient, (sender, _) in pairs.items():
                set_liveness(sender, patient=patient)
                sender.settimeout(9.0)
                ends[patient] = pool.submit(timed, lambda s=sender: send_for_ever(s))
            hasty, error = ends[False].result(20)
            assert hasty < 9.0
            assert not isinstance(error, TimeoutError) or error.errno  # the kernel's
            slow, error = ends[True].result(20)
            assert slow >= 9.0
            assert not error.errno  # our own settimeout: the connection lives
            for pair in pairs.values():
                for sock in pair:
                    sock.close()
