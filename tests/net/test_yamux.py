import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fabric.core.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    ResourceExhausted,
)
from fabric.net.yamux import (
    CLOSED_STREAM_SECONDS,
    DATA,
    FIN,
    INITIAL_WINDOW_BYTES,
    MAX_FRAME_BYTES,
    PING,
    SYN,
    WINDOW_UPDATE,
    YamuxSession,
)

WINDOW = 512 * 1024


def session(initiator=True, max_streams=8):
    return YamuxSession(
        initiator=initiator, window_bytes=WINDOW, max_streams=max_streams
    )


def frame(kind, flags, stream_id, length, body=b""):
    return struct.pack("!BBHII", 0, kind, flags, stream_id, length) + body


def pump(one, two, cut=0):
    """Carry all output across, in pieces of ``cut`` bytes."""
    while one.has_output or two.has_output:
        for source, sink in ((one, two), (two, one)):
            data = source.output()
            step = cut or len(data) or 1
            for start in range(0, len(data), step):
                sink.receive(data[start : start + step])


def pair():
    one, two = session(True), session(False)
    near = one.open()
    pump(one, two)
    return one, two, near, two.take_opened()


def test_full_frames_fit_one_noise_message():
    one, _, near, _ = pair()
    one.send(near, memoryview(bytes(MAX_FRAME_BYTES)))
    assert len(one.output()) == MAX_FRAME_BYTES + 12 + 12  # a full frame and 12 B


def test_credit_stops_a_writer_and_reading_frees_it():
    one, two, near, far = pair()
    sent = 0
    for _ in range(8):
        sent += one.send(near, memoryview(bytes(128 * 1024)))
        pump(one, two)
    assert sent == INITIAL_WINDOW_BYTES == far.buffered
    assert one.send(near, memoryview(b"x")) == 0
    assert len(two.take(far, 1 << 20)) == INITIAL_WINDOW_BYTES
    pump(one, two)
    assert near.send_credit == WINDOW  # the window grew while the reader kept up


def test_half_close_and_end():
    one, two, near, far = pair()
    one.send(near, memoryview(b"bye"))
    one.finish(near, 0.0)
    pump(one, two)
    assert (far.remote_closed, two.take(far, 9)) == (True, b"bye")
    with pytest.raises(LocalProtocolError):
        one.send(near, memoryview(b"more"))
    two.send(far, memoryview(b"ok"))
    two.finish(far, 0.0)
    pump(one, two)
    assert one.take(near, 9) == b"ok"
    assert one.streams() == two.streams() == ()


def test_a_discarded_stream_resets_the_writer_that_goes_on():
    one, two, near, far = pair()
    two.discard(far, 0.0)
    pump(one, two)
    assert near.remote_closed
    assert not near.reset
    one.send(near, memoryview(b"x"))
    pump(one, two)
    assert near.reset
    assert one.streams() == two.streams() == ()


def test_sweep_resets_what_the_peer_never_closes():
    one, two, near, far = pair()
    one.finish(near, 10.0)
    one.sweep(10.0 + CLOSED_STREAM_SECONDS)
    assert not near.reset
    one.sweep(11.0 + CLOSED_STREAM_SECONDS)
    pump(one, two)
    assert near.reset
    assert far.reset


def test_stream_limits_both_ways():
    one, two = session(True, max_streams=2), session(False, max_streams=1)
    first, second = one.open(), one.open()
    with pytest.raises(ResourceExhausted):
        one.open()
    pump(one, two)
    assert (first.reset, second.reset) == (False, True)


def test_pings_are_answered():
    one, two = session(True), session(False)
    two.receive(frame(PING, SYN, 0, 77))
    assert two.output() == frame(PING, 2, 0, 77)
    one.receive(frame(PING, 2, 0, 77))
    assert one.frames_received == 1


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x01" + bytes(11),  # another version
        b"\x00\x09" + bytes(10),  # another type
        frame(WINDOW_UPDATE, SYN, 0, 0),  # stream 0
        frame(WINDOW_UPDATE, SYN, 1, 0),  # our own parity
        frame(WINDOW_UPDATE, SYN, 2, 0) * 2,  # opened twice
        frame(DATA, SYN, 2, INITIAL_WINDOW_BYTES + 1),  # above the window
        frame(DATA, 0, 9, 0xFFFFFFFF),  # 4 GiB on no stream
        frame(WINDOW_UPDATE, SYN, 2, 0xFFFFFFFF)
        + frame(WINDOW_UPDATE, 0, 2, 0xFFFFFFFF) * 2,  # endless credit
        frame(PING, SYN, 0, 1) * 60_000,  # asks and does not read
    ],
)
def test_hostile_frames_are_the_peers_fault(hostile):
    with pytest.raises(RemoteProtocolError):
        session(True).receive(hostile)


@given(st.binary(max_size=400))
@settings(max_examples=150)
def test_any_bytes_are_taken_or_refused(data):
    with suppress(RemoteProtocolError):
        session(True).receive(data)


def test_small_frames_do_not_pin_their_messages():
    one = session(True)
    one.receive(frame(WINDOW_UPDATE, SYN, 2, 0))
    state = one.take_opened()
    for _ in range(1000):
        one.receive(frame(DATA, 0, 2, 1, b"x") + frame(DATA, FIN, 4, 0))
    assert len(state.chunks) == 1
    assert one.take(state, 600) == b"x" * 600
    assert one.take(state, 600) == b"x" * 400


class TwoPeers(RuleBasedStateMachine):
    """Any order of calls: what is read is what was written, and all of it arrives."""

    def __init__(self):
        super().__init__()
        self.ends = (session(True, 64), session(False, 64))
        self.streams = []  # [states, written, read], each indexed by end
        self.cut = 7

    @rule(end=st.sampled_from((0, 1)))
    def open(self, end):
        state = self.ends[end].open()
        pump(*self.ends, cut=self.cut)
        states = [None, None]
        states[end], states[1 - end] = state, self.ends[1 - end].take_opened()
        self.streams.append((states, [b"", b""], [b"", b""]))

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), end=st.sampled_from((0, 1)), size=st.integers(1, 200_000))
    def write(self, data, end, size):
        states, written, _ = data.draw(st.sampled_from(self.streams))
        if states[end].local_closed or states[end].reset:
            return
        payload = bytes([size % 251]) * size
        taken = self.ends[end].send(states[end], memoryview(payload))
        written[end] += payload[:taken]

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), end=st.sampled_from((0, 1)), size=st.integers(1, 300_000))
    def read(self, data, end, size):
        states, _, read = data.draw(st.sampled_from(self.streams))
        read[end] += self.ends[end].take(states[end], size)

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), end=st.sampled_from((0, 1)))
    def finish(self, data, end):
        states, _, _ = data.draw(st.sampled_from(self.streams))
        self.ends[end].finish(states[end], 0.0)

    @rule(cut=st.sampled_from((0, 1009, 65519)))
    def carry(self, cut):
        self.cut = cut
        pump(*self.ends, cut=cut)

    @invariant()
    def nothing_is_invented_or_reordered(self):
        for _, written, read in self.streams:
            assert written[0].startswith(read[1])
            assert written[1].startswith(read[0])

    @invariant()
    def windows_are_kept(self):
        for states, _, _ in self.streams:
            for state in states:
                assert state.buffered <= WINDOW
                assert state.buffered == sum(len(chunk) for chunk in state.chunks)

    def teardown(self):
        for states, written, read in self.streams:
            for end in (0, 1):
                while len(read[1 - end]) < len(written[end]):
                    pump(*self.ends)
                    part = self.ends[1 - end].take(states[1 - end], 1 << 20)
                    assert part, "bytes got lost"
                    read[1 - end] += part
                self.ends[end].finish(states[end], 0.0)
        pump(*self.ends)
        assert self.ends[0].streams() == self.ends[1].streams() == ()


TestTwoPeers = TwoPeers.TestCase
TestTwoPeers.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
