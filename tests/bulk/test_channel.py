"""Frames over sockets: round trips, bounds before allocation, stalls."""

import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.bulk.channel import MAX_META_BYTES, BulkReceiver, BulkSender
from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    PeerTimeout,
    RemoteProtocolError,
    Unavailable,
)

LIMIT = 4 << 20


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@given(
    frames=st.lists(
        st.tuples(st.integers(0, 255), st.binary(max_size=40), st.binary(max_size=300)),
        max_size=8,
    )
)
@settings(max_examples=30, deadline=None)
def test_frames_arrive_as_sent(frames):
    left, right = socket.socketpair()
    with left, right:
        sender, receiver = BulkSender(left), BulkReceiver(right, LIMIT)
        for kind, meta, payload in frames:
            sender.send(kind, meta, payload)
        for kind, meta, payload in frames:
            frame = receiver.receive()
            assert (frame.kind, frame.meta, frame.payload) == (kind, meta, payload)


def test_large_payload_into_a_buffer_of_the_caller(pair):
    left, right = pair
    payload = bytes(range(256)) * (3 << 12)  # 3 MiB: more than one chunk
    sending = threading.Thread(
        target=lambda: BulkSender(left).send(7, b"m", memoryview(payload))
    )
    sending.start()
    receiver = BulkReceiver(right, LIMIT)
    head = receiver.receive_head()
    assert (head.kind, head.meta, head.payload_bytes) == (7, b"m", len(payload))
    mine = bytearray(len(payload))
    receiver.receive_payload(mine)
    sending.join()
    assert mine == payload


def test_oversized_announcement_is_refused_before_it_is_allocated(pair):
    left, right = pair
    left.sendall(struct.pack(">BIQ", 1, 0, 1 << 62))
    with pytest.raises(RemoteProtocolError, match="payload of"):
        BulkReceiver(right, LIMIT).receive()


def test_oversized_meta_is_refused_on_both_sides(pair):
    left, right = pair
    with pytest.raises(ValueError, match="meta"):
        BulkSender(left).send(1, bytes(MAX_META_BYTES + 1))
    left.sendall(struct.pack(">BIQ", 1, MAX_META_BYTES + 1, 0))
    with pytest.raises(RemoteProtocolError, match="meta"):
        BulkReceiver(right, LIMIT).receive()


def test_closed_peer_is_unavailable_even_inside_a_frame(pair):
    left, right = pair
    left.sendall(struct.pack(">BIQ", 1, 0, 100) + b"half")
    left.close()
    with pytest.raises(Unavailable, match="closed"):
        BulkReceiver(right, LIMIT).receive()


def test_stalled_peer_times_out_when_reading_and_when_writing(pair):
    left, right = pair
    with pytest.raises(PeerTimeout):
        BulkReceiver(right, LIMIT, stall_seconds=0.02).receive()
    with pytest.raises(PeerTimeout):
        BulkSender(left, stall_seconds=0.02).send(1, b"", bytes(LIMIT))


def test_the_payload_must_be_taken_before_the_next_frame(pair):
    left, right = pair
    BulkSender(left).send(1, b"", b"abc")
    receiver = BulkReceiver(right, LIMIT)
    receiver.receive_head()
    with pytest.raises(LocalProtocolError):
        receiver.receive_head()
    with pytest.raises(LocalProtocolError):
        receiver.receive_payload(bytearray(2))


@given(st.binary(max_size=200))
@settings(max_examples=40, deadline=None)
def test_door_any_bytes(data):
    left, right = socket.socketpair()
    with left, right:
        left.sendall(data)
        left.shutdown(socket.SHUT_WR)
        receiver = BulkReceiver(right, 1 << 10)
        try:
            while True:
                assert len(receiver.receive().payload) <= 1 << 10
        except FabricError as exc:
            assert isinstance(exc, RemoteProtocolError | Unavailable)  # noqa: PT017
