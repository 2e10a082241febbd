"""The RPC state machine without I/O: any order, any cut, any bytes."""

import math
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fabric.core.errors import (
    FabricError,
    PeerTimeout,
    RemoteProtocolError,
    RemoteRefused,
    ResourceExhausted,
)
from fabric.net.data_config import RpcConfig
from fabric.net.rpc_api import MAX_RPC_BYTES
from fabric.net.rpc_core import (
    CancelReceived,
    RefusalReceived,
    RequestReceived,
    ResponseReceived,
    RpcCore,
)

CONFIG = RpcConfig()


def frame(kind, call, body=b""):
    return struct.pack(">IBI", 5 + len(body), kind, call) + body


def move(source, target, now=0.0):
    data = source.take_output()
    source.on_sent(len(data))
    return target.receive(data, now)


def test_a_call_is_answered_and_carries_its_remaining_time():
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    call = a.request("x.echo", b"payload", deadline=2.5, now=0.5)
    assert move(a, b) == [RequestReceived(call, "x.echo", b"payload", 2.0)]
    b.respond(call, b"answer")
    assert move(b, a) == [ResponseReceived(call, b"answer")]
    b.respond(call, b"again")  # answered: nothing leaves
    assert not b.has_output


def test_a_refusal_keeps_code_reason_and_next_step_within_bounds():
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    call = a.request("x", b"", 1.0, 0.0)
    move(a, b)
    error = RemoteRefused(
        "r" * 9999, code="E_X", next_step="wait", retry_after_seconds=3.0
    )
    b.refuse(call, error)
    (event,) = move(b, a)
    assert isinstance(event, RefusalReceived)
    assert event.error.code == "E_X"
    assert event.error.reason == "r" * 500
    assert event.error.next_step == "wait"
    assert event.error.retry_after_seconds == 3.0


def test_cancelled_call_reaches_the_peer_and_its_late_answer_is_ignored():
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    call = a.request("x", b"", 1.0, 0.0)
    move(a, b)
    a.cancel(call)
    b.respond(call, b"late")
    assert move(a, b) == []  # already answered on that side
    assert move(b, a) == []
    other = a.request("x", b"", 1.0, 0.0)
    a.cancel(other)
    assert [type(e) for e in move(a, b)] == [RequestReceived, CancelReceived]


def test_deadlines_expire_in_order_and_answered_calls_do_not():
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    late = a.request("x", b"", 0.9, 0.0)
    soon = a.request("x", b"", 0.2, 0.0)
    done = a.request("x", b"", 0.1, 0.0)
    move(a, b)
    b.respond(done, b"")
    move(b, a)
    a.on_timeout(0.0)  # the first ping
    assert a.next_timeout() == 0.2
    assert a.on_timeout(0.2) == [soon]
    assert a.on_timeout(0.9) == [late]


@pytest.mark.parametrize("deadline", [-math.inf, -1.0, 0.0, 1e12])
def test_any_deadline_can_be_sent(deadline):
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    call = a.request("x", b"", deadline, 0.0)
    assert [type(e) for e in move(a, b)] == [RequestReceived]
    assert (call in a.on_timeout(0.0)) == (deadline <= 0)


def test_many_answered_calls_leave_no_deadlines_behind():
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    for _ in range(5000):
        call = a.request("x", b"", 10.0, 0.0)
        move(a, b)
        b.respond(call, b"")
        move(b, a)
    assert len(a._deadlines) <= 1026


def test_pings_measure_the_round_trip_and_silence_is_noticed():
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    assert a.on_timeout(0.0) == []
    move(a, b, now=0.05)
    move(b, a, now=0.1)
    assert a.rtt_seconds == pytest.approx(0.1)
    for second in (1.0, 2.0, 3.0, 4.0, 5.0):
        a.on_timeout(second)
    with pytest.raises(PeerTimeout, match=r"silent for 5\.0 s"):
        a.on_timeout(5.1)


def test_a_late_timer_gives_the_peer_another_interval():
    a = RpcCore(CONFIG, 0.0)
    a.on_timeout(0.0)
    a.on_timeout(30.0)  # we were suspended, not the peer
    with pytest.raises(PeerTimeout):
        a.on_timeout(31.0)


def test_a_peer_that_takes_nothing_is_given_up():
    a = RpcCore(CONFIG, 0.0)
    a.request("x", b"waiting", 100.0, 0.0)
    for second in range(6):
        a.receive(frame(6, 99), float(second))  # it talks, but does not listen
        if second < 5:
            a.on_timeout(float(second))
    with pytest.raises(PeerTimeout, match="took none"):
        a.on_timeout(5.0)


def test_full_queue_and_too_many_calls_are_our_own_limits():
    config = RpcConfig(max_queued_bytes=1000, max_in_flight=3)
    a = RpcCore(config, 0.0)
    with pytest.raises(ResourceExhausted, match="wait for this peer"):
        a.request("x", bytes(1001), 1.0, 0.0)
    for _ in range(3):
        a.request("x", b"", 1.0, 0.0)
    with pytest.raises(ResourceExhausted, match="3 calls"):
        a.request("x", b"", 1.0, 0.0)
    with pytest.raises(ValueError, match="at most"):
        a.request("x", bytes(MAX_RPC_BYTES + 1), 1.0, 0.0)


def test_answers_that_the_peer_does_not_take_end_the_connection():
    a = RpcCore(RpcConfig(max_queued_bytes=100), 0.0)
    (request,) = a.receive(frame(1, 7, struct.pack(">IB", 1000, 1) + b"x"), 0.0)
    with pytest.raises(ResourceExhausted):
        a.respond(request.id, bytes(200))


def test_draining_ends_when_nothing_is_open_and_nobody_called_lately():
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    call = a.request("x", b"", 100.0, 1.0)
    a.drain()
    assert not a.is_drained(50.0)
    move(a, b)
    b.respond(call, b"")
    move(b, a)
    assert not a.is_drained(2.9)
    assert a.is_drained(3.0)
    assert not b.is_drained(99.0)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">IBI", MAX_RPC_BYTES + 1000, 1, 1),  # oversized, only announced
        struct.pack(">IBI", 2, 1, 1),  # shorter than its own header
        frame(77, 1),
        frame(1, 1, b"abc"),
        frame(1, 1, struct.pack(">IB", 1, 200) + b"x" * 250),
        frame(1, 1, struct.pack(">IB", 1, 5) + b"x"),
        frame(1, 1, struct.pack(">IB", 1, 1) + b"\xff"),
        frame(1, 1, struct.pack(">IB", 1, 0)) * 2,  # one id twice
        frame(3, 1, b"\xc1"),
        frame(3, 1, msgspec.msgpack.encode({"code": "x" * 65})),
    ],
)
def test_malformed_frames_are_protocol_errors(data):
    with pytest.raises(RemoteProtocolError):
        RpcCore(CONFIG, 0.0).receive(data, 0.0)


@given(st.lists(st.binary(max_size=60), max_size=6))
@settings(max_examples=100, deadline=None)
def test_door_any_bytes(chunks):
    core = RpcCore(CONFIG, 0.0)
    core.request("x", b"", 1.0, 0.0)
    try:
        for chunk in chunks:
            core.receive(chunk, 0.0)
    except FabricError as exc:
        assert isinstance(exc, RemoteProtocolError)  # noqa: PT017


@given(
    payloads=st.lists(st.binary(max_size=50), min_size=1, max_size=8),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=40),
)
@settings(max_examples=50, deadline=None)
def test_frames_survive_any_cut(payloads, cuts):
    a, b = RpcCore(CONFIG, 0.0), RpcCore(CONFIG, 0.0)
    for payload in payloads:
        a.request("m", payload, 1.0, 0.0)
    data = a.take_output()
    events = []
    at = 0
    for cut in cuts:
        events += b.receive(data[at : at + cut], 0.0)
        at += cut
    events += b.receive(data[at:], 0.0)
    assert [e.payload for e in events] == payloads


class Calls(RuleBasedStateMachine):
    """Two cores and a wire: each call ends exactly once, whatever happens."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.a = RpcCore(CONFIG, 0.0)
        self.b = RpcCore(CONFIG, 0.0)
        self.open = set()
        self.ended = []
        self.serving = set()

    @rule(seconds=st.floats(0.01, 3.0))
    def call(self, seconds):
        self.open.add(self.a.request("m", b"q", self.now + seconds, self.now))

    @rule(pick=st.randoms(use_true_random=False))
    def cancel(self, pick):
        if self.open:
            self._end(pick.choice(sorted(self.open)))
            self.a.cancel(self.ended[-1])

    @rule()
    def deliver_to_b(self):
        for event in move(self.a, self.b, self.now):
            match event:
                case RequestReceived():
                    self.serving.add(event.id)
                case CancelReceived():
                    self.serving.discard(event.id)

    @rule(pick=st.randoms(use_true_random=False), refuse=st.booleans())
    def answer(self, pick, refuse):
        if self.serving:
            call = pick.choice(sorted(self.serving))
            self.serving.discard(call)
            if refuse:
                self.b.refuse(call, FabricError("no"))
            else:
                self.b.respond(call, b"r")

    @rule()
    def deliver_to_a(self):
        for event in move(self.b, self.a, self.now):
            self._end(event.id)

    @rule(seconds=st.floats(0.0, 0.9))
    def wait(self, seconds):
        self.now += seconds
        for call in self.a.on_timeout(self.now):
            self._end(call)
        self.b.on_timeout(self.now)
        self.deliver_to_b()
        self.deliver_to_a()

    def _end(self, call):
        assert call in self.open
        self.open.discard(call)
        self.ended.append(call)

    @invariant()
    def cores_agree_with_the_model(self):
        assert self.a._open == self.open
        assert len(set(self.ended)) == len(self.ended)

    def teardown(self):
        for _ in range(8):  # if nobody does anything more, time ends every call
            self.now += 0.5
            for call in self.a.on_timeout(self.now):
                self._end(call)
            self.b.on_timeout(self.now)
            move(self.a, self.b, self.now)
            for event in move(self.b, self.a, self.now):
                self._end(event.id)
        assert not self.open


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
