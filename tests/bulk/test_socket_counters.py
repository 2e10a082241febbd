"""Byte counts of TCP by the kernel, of Unix sockets by the wrapper."""

import socket
import sys

import pytest

from fabric.bulk.channel import BulkReceiver, BulkSender
from fabric.bulk.socket_counters import (
    CountingSocket,
    LinkBytes,
    kernel_counts,
    link_bytes,
)


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO offsets of Linux")
def test_kernel_counts_both_directions_of_tcp():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    with left, right:
        left.sendall(b"x" * 5000)
        assert len(right.recv(5000, socket.MSG_WAITALL)) == 5000
        right.sendall(b"y" * 70)
        assert len(left.recv(70, socket.MSG_WAITALL)) == 70
        assert kernel_counts(left)
        # a SYN or FIN counts as one acknowledged byte
        assert 5000 <= link_bytes(left).sent <= 5001
        assert link_bytes(left).received == 70
        assert link_bytes(right).received == 5000


def test_wrapper_counts_a_unix_socket_through_a_channel():
    left, right = socket.socketpair()
    with left, right:
        assert not kernel_counts(left)
        with pytest.raises(ValueError, match="AF_UNIX"):
            link_bytes(left)
        sending, receiving = CountingSocket(left), CountingSocket(right)
        BulkSender(sending).send(1, b"meta", b"payload")
        BulkReceiver(receiving, 100).receive()
        total = 13 + 4 + 7
        assert link_bytes(sending) == LinkBytes(total, 0)
        assert link_bytes(sending) + link_bytes(receiving) == LinkBytes(total, total)
