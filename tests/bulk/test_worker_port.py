import array
import os
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.bulk.worker_port import (
    MAX_WORKER_FRAME,
    WorkerPort,
    start_worker,
)
from fabric.core.errors import LocalProtocolError, RemoteProtocolError, Unavailable


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    port = WorkerPort(theirs.detach())
    yield ours, port
    ours.close()
    port.close()


def framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def send_with(sock, data, fds):
    rights = array.array("i", fds)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def test_frames_arrive_in_order(pair):
    ours, port = pair
    ours.sendall(framed(b"one") + framed(b"") + framed(b"three"))
    assert [port.receive() for _ in range(3)] == [
        (b"one", ()),
        (b"", ()),
        (b"three", ()),
    ]


def test_descriptors_stay_with_their_frame(pair):
    ours, port = pair
    read_end, write_end = os.pipe()
    ours.sendall(framed(b"before"))
    send_with(ours, framed(b"with"), [write_end])
    ours.sendall(framed(b"after"))
    os.close(write_end)
    assert port.receive() == (b"before", ())
    frame, (fd,) = port.receive()
    assert frame == b"with"
    assert port.receive() == (b"after", ())
    os.write(fd, b"alive")
    os.close(fd)
    assert os.read(read_end, 9) == b"alive"
    os.close(read_end)


def test_received_descriptors_are_blocking(pair):
    ours, port = pair
    left, right = socket.socketpair()
    left.setblocking(False)
    send_with(ours, framed(b"x"), [left.fileno()])
    _, (fd,) = port.receive()
    assert os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)
    left.close()
    right.close()


def test_end_of_stream_is_unavailable(pair):
    ours, port = pair
    ours.sendall(struct.pack(">I", 10) + b"cut")
    ours.close()
    with pytest.raises(Unavailable):
        port.receive()
    with pytest.raises(Unavailable):
        port.send(b"x")


def test_oversized_frames_are_refused_on_both_sides(pair):
    ours, port = pair
    ours.sendall(struct.pack(">I", MAX_WORKER_FRAME + 1))
    with pytest.raises(RemoteProtocolError):
        port.receive()
    with pytest.raises(LocalProtocolError):
        port.send(bytes(MAX_WORKER_FRAME + 1))


def test_senders_in_many_threads_do_not_mix_frames(pair):
    ours, port = pair
    bodies = [bytes([i]) * 20_000 for i in range(8)]
    threads = [
        threading.Thread(target=lambda b=body: [port.send(b) for _ in range(5)])
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    with ours.makefile("rb") as stream:
        for _ in range(40):
            (length,) = struct.unpack(">I", stream.read(4))
            assert stream.read(length) in bodies
    for thread in threads:
        thread.join()


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_frames_or_one_error(data):
    ours, theirs = socket.socketpair()
    port = WorkerPort(theirs.detach())
    ours.sendall(data)
    ours.close()
    try:
        while True:
            port.receive()
    except (Unavailable, RemoteProtocolError):
        pass
    finally:
        port.close()


@pytest.mark.parametrize("argv", [[], ["{}"], ["nonsense"], ['{"fd": 3}']])
def test_started_by_hand_says_so(argv):
    with pytest.raises(SystemExit, match="daemon"):
        start_worker(argv)
