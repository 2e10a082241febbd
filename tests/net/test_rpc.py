"""The RPC service over memory streams and virtual time."""

from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
from trio.testing import lockstep_stream_pair, memory_stream_pair

from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    NoRoute,
    PeerTimeout,
    RemoteRefused,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.telemetry import Counters
from fabric.net.data_config import RpcConfig
from fabric.net.ports import ALL_PATHS, ALLOWED, Decision
from fabric.net.rpc import open_rpc

DEFAULTS = RpcConfig()
DENIED = Decision(False, "E_NOT_ADMITTED", "not a member", "fabric mesh join")


class FakeGate:
    def __init__(self):
        self.denied = set()

    def allows(self, peer, protocol):
        return DENIED if peer in self.denied else ALLOWED


class Wires:
    """Connects services by name; each end can be cut, and dials can be held."""

    def __init__(self):
        self.services = {}
        self.counters = {}
        self.gates = {}
        self.dials = 0
        self.streams = []
        self.pair = memory_stream_pair
        self.hold = None
        self.kind = "direct"

    def connector(self, name):
        wires = self

        class Connector:
            async def connect(self, peer, kinds):
                wires.dials += 1
                kind = wires.kind
                if kind not in kinds:
                    raise NoRoute("both sides map per destination")
                if wires.hold is not None:
                    await wires.hold.wait()
                if peer not in wires.services:
                    raise Unavailable(f"no path to {peer}")
                ours, theirs = wires.pair()
                wires.streams += [ours, theirs]
                await wires.services[peer].accept(name, theirs, kind)
                return ours, kind

        return Connector()


@asynccontextmanager
async def mesh(*names, config=DEFAULTS):
    wires = Wires()
    async with AsyncExitStack() as stack:
        for name in names:
            wires.counters[name] = Counters()
            wires.gates[name] = FakeGate()
            wires.services[name] = await stack.enter_async_context(
                open_rpc(
                    config,
                    name,
                    wires.connector(name),
                    wires.gates[name],
                    wires.counters[name],
                )
            )
        yield wires


async def hang(peer, request):
    await trio.sleep_forever()


def echo(peer, request):
    return peer.encode() + b":" + request


async def test_either_side_calls_over_one_connection(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        a.register("x.echo", echo)
        b.register("x.echo", echo)
        assert await a.call("b", "x.echo", b"1") == b"a:1"
        assert await b.call("a", "x.echo", b"2") == b"b:2"
        assert wires.dials == 1
        assert a.connected() == {"b"}
        assert b.connected() == {"a"}
        await trio.sleep(0.1)
        assert a.rtt_seconds("b") is not None
        assert a.rtt_seconds("c") is None


async def test_many_calls_share_one_dial(autojump_clock):
    async with mesh("a", "b") as wires:
        wires.services["b"].register("x.echo", echo)
        answers = []

        async def call(i):
            answers.append(await wires.services["a"].call("b", "x.echo", b"%d" % i))

        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(call, i)
        assert sorted(answers) == sorted(b"a:%d" % i for i in range(50))
        assert wires.dials == 1


async def test_async_handlers_overtake_each_other(autojump_clock):
    async with mesh("a", "b") as wires:

        async def sleep(peer, request):
            await trio.sleep(float(request))
            return request

        wires.services["b"].register_async("x.sleep", sleep)
        order = []

        async def call(seconds):
            order.append(await wires.services["a"].call("b", "x.sleep", seconds))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, b"3")
            nursery.start_soon(call, b"1")
        assert order == [b"1", b"3"]


async def test_refusal_travels_with_code_reason_and_next_step(autojump_clock):
    async with mesh("a", "b") as wires:

        def no(peer, request):
            raise ResourceExhausted("full", code="E_FULL", next_step="wait")

        wires.services["b"].register("x.no", no)
        with pytest.raises(RemoteRefused) as info:
            await wires.services["a"].call("b", "x.no", b"")
        assert (info.value.code, info.value.reason) == ("E_FULL", "full")
        assert info.value.next_step == "wait"
        with pytest.raises(RemoteRefused) as info:
            await wires.services["a"].call("b", "x.unknown", b"")
        assert info.value.code == "E_NO_METHOD"
        assert wires.counters["b"].snapshot()["refusals_total:E_FULL"] == 1


@pytest.mark.parametrize("kind", ["inline", "async"])
async def test_bug_in_a_handler_is_counted_and_ends_nothing(kind, autojump_clock):
    async with mesh("a", "b") as wires:

        def broken(peer, request):
            raise KeyError("oops")

        async def broken_async(peer, request):
            raise KeyError("oops")

        b = wires.services["b"]
        b.register("x.echo", echo)
        if kind == "inline":
            b.register("x.bug", broken)
        else:
            b.register_async("x.bug", broken_async)
        with pytest.raises(RemoteRefused) as info:
            await wires.services["a"].call("b", "x.bug", b"")
        assert info.value.code == "E_BUG"
        assert "oops" not in info.value.reason
        assert wires.counters["b"].snapshot()["bugs_total"] == 1
        assert await wires.services["a"].call("b", "x.echo", b"") == b"a:"


async def test_bugs_surface_when_tests_ask_for_it(autojump_clock):
    async def call_a_bug():
        async with mesh("a", "b", config=RpcConfig(raise_bugs=True)) as wires:
            wires.services["b"].register("x.bug", lambda p, r: {}["oops"])
            with suppress(Unavailable):
                await wires.services["a"].call("b", "x.bug", b"")
            await trio.sleep_forever()

    with pytest.raises(KeyError):
        await call_a_bug()


async def test_call_without_deadline_gets_the_default(autojump_clock):
    async with mesh("a", "b") as wires:
        wires.services["b"].register_async("x.hang", hang)
        start = trio.current_time()
        with pytest.raises((PeerTimeout, RemoteRefused)) as info:
            await wires.services["a"].call("b", "x.hang", b"")
        assert info.value.code == "E_TIMEOUT"
        assert trio.current_time() - start == pytest.approx(10.0, abs=0.1)


async def test_cancelled_call_cancels_the_handler(autojump_clock):
    async with mesh("a", "b") as wires:
        cancelled = trio.Event()

        async def hang_and_tell(peer, request):
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        wires.services["b"].register_async("x.hang", hang_and_tell)
        with trio.move_on_after(1):
            await wires.services["a"].call("b", "x.hang", b"")
        with trio.fail_after(0.1):  # by the message, long before any deadline
            await cancelled.wait()


async def test_a_call_in_a_cancelled_scope_is_cancelled(autojump_clock):
    async with mesh("a", "b") as wires:
        asked = []
        wires.services["b"].register("x.ask", lambda peer, request: asked.append(1))
        with trio.CancelScope() as scope:
            scope.cancel()
            await wires.services["a"].call("b", "x.ask", b"")
        assert scope.cancelled_caught
        assert not asked


async def test_too_many_async_calls_are_refused(autojump_clock):
    async with mesh("a", "b", config=RpcConfig(max_async_handlers=2)) as wires:
        wires.services["b"].register_async("x.hang", hang)
        codes = []

        async def call():
            with trio.move_on_after(1):
                try:
                    await wires.services["a"].call("b", "x.hang", b"")
                except RemoteRefused as exc:
                    codes.append(exc.code)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(call)
        assert codes == ["E_BUSY"] * 3


async def test_broken_connection_fails_its_calls_and_is_announced(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        lost = a.lost()
        b.register_async("x.hang", hang)
        b.register("x.echo", echo)

        async def cut():
            await trio.sleep(1)
            await wires.streams[1].aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            with pytest.raises(Unavailable, match="connection with b"):
                await a.call("b", "x.hang", b"")
        assert await lost.receive() == "b"
        assert a.connected() == frozenset()
        assert await a.call("b", "x.echo", b"again") == b"a:again"  # a new connection


async def test_silent_peer_is_lost_after_the_limit(autojump_clock):
    async with mesh("a", "b") as wires:
        a = wires.services["a"]
        lost = a.lost()
        silent, theirs = memory_stream_pair()
        await a.accept("s", theirs)
        start = trio.current_time()
        assert await lost.receive() == "s"
        assert 5.0 <= trio.current_time() - start < 6.5
        await silent.aclose()


async def test_stalled_reader_is_disconnected_and_stalls_nobody_else(autojump_clock):
    async with mesh("a", "b", config=RpcConfig(max_queued_bytes=1 << 16)) as wires:
        a, b = wires.services["a"], wires.services["b"]
        b.register("x.echo", echo)
        lost = a.lost()
        stalled, theirs = lockstep_stream_pair()  # sending waits for the reader
        await a.accept("stalled", theirs)
        refused = 0
        async with trio.open_nursery() as nursery:

            async def call(peer):
                nonlocal refused
                try:
                    await a.call(peer, "x.echo", bytes(30_000))
                except ResourceExhausted:
                    refused += 1
                except Unavailable:
                    pass

            for _ in range(10):
                nursery.start_soon(call, "stalled")
            with trio.fail_after(1):
                for _ in range(20):
                    await a.call("b", "x.echo", b"fine")
        assert refused >= 7
        assert await lost.receive() == "stalled"
        assert a.connected() == {"b"}
        await trio.aclose_forcefully(stalled)


@pytest.mark.parametrize("data", [b"\xff" * 9, b"\x00\x00\x00\x05\x63\x00\x00\x00\x01"])
async def test_corrupt_or_oversized_frame_closes_that_connection_only(
    data, autojump_clock
):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        b.register("x.echo", echo)
        await a.call("b", "x.echo", b"")
        evil, theirs = memory_stream_pair()
        await b.accept("evil", theirs)
        lost = b.lost()
        await evil.send_all(data)
        assert await lost.receive() == "evil"
        assert wires.counters["b"].snapshot()["protocol_errors_total:rpc"] == 1
        assert await a.call("b", "x.echo", b"still") == b"a:still"


async def test_simultaneous_dials_settle_on_the_lower_initiator(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        a.register("x.echo", echo)
        b.register("x.echo", echo)
        wires.hold = trio.Event()
        answers = []

        async def call(service, peer):
            for i in range(100):
                answers.append(await service.call(peer, "x.echo", b"%d" % i))
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, a, "b")
            nursery.start_soon(call, b, "a")
            await trio.testing.wait_all_tasks_blocked()
            wires.hold.set()
        assert wires.dials == 2
        assert len(answers) == 200  # no call broke
        assert len(a._links) == len(b._links) == 1
        assert a._links.live("b").initiator == b._links.live("a").initiator == "a"


async def test_an_upgrade_leaves_the_relay_and_breaks_no_call(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        b.register("x.echo", echo)
        held = trio.Event()

        async def slow(peer, request):
            await held.wait()
            return b"late"

        b.register_async("x.slow", slow)
        wires.kind = "relay"
        await a.call("b", "x.echo", b"")
        assert (a.kind("b"), b.kind("a")) == ("relay", "relay")
        with pytest.raises(NoRoute):
            await a.upgrade("b")  # no better path yet: the relay stays
        assert a.kind("b") == "relay"
        answers = []

        async def call():
            answers.append(await a.call("b", "x.slow", b""))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            wires.kind = "punched"
            await a.upgrade("b")
            assert (a.kind("b"), b.kind("a")) == ("punched", "punched")
            assert await a.call("b", "x.echo", b"new") == b"a:new"
            held.set()
        assert answers == [b"late"]
        dials = wires.dials
        await a.upgrade("b")  # nothing to do
        assert wires.dials == dials
        wires.kind = "relay"  # a late relayed connection does not take over for long
        await a._adopt("b", *await wires.connector("a").connect("b", ALL_PATHS))
        await trio.sleep(0.01)  # the other one shows that it is alive
        assert a.kind("b") == b.kind("a") == "punched"


async def test_gate_is_asked_whoever_dials(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        b.register("x.echo", echo)
        wires.gates["a"].denied.add("b")
        with pytest.raises(Unavailable) as info:
            await a.call("b", "x.echo", b"")
        assert info.value.code == "E_NOT_ADMITTED"
        assert info.value.next_step == "fabric mesh join"
        assert wires.dials == 0
        wires.gates["a"].denied.clear()
        wires.gates["b"].denied.add("a")
        with pytest.raises(Unavailable):
            await a.call("b", "x.echo", b"")
        assert b.connected() == frozenset()


async def test_disconnect_closes_a_live_connection(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        b.register("x.echo", echo)
        await a.call("b", "x.echo", b"")
        lost = a.lost()
        await b.disconnect("a")
        assert await lost.receive() == "b"


async def test_a_retired_connection_is_missed_by_nobody(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        a.background = b.background = frozenset({"x.sync"})
        for each in (a, b):
            each.register("x.echo", echo)
            each.register("x.sync", echo)
        held = trio.Event()

        async def hold(peer, request):
            await held.wait()
            return b"late"

        b.register_async("x.hold", hold)
        lost = (a.lost(), b.lost())
        assert await a.call("b", "x.echo", b"") == b"a:"
        await trio.sleep(30)
        await a.call("b", "x.sync", b"")
        assert a.idle_seconds("b") == b.idle_seconds("a") == 30
        answers = []

        async def call():
            answers.append(await a.call("b", "x.hold", b""))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            assert a.idle_seconds("b") == b.idle_seconds("a") == 0
            a.retire("b")
            b.retire("a")
            assert a.connected() == b.connected() == frozenset()
            await trio.sleep(3)
            held.set()
        assert answers == [b"late"]
        assert await a.call("b", "x.echo", b"2") == b"a:2"
        assert (wires.dials, a.num_connections("b")) == (2, 2)
        await trio.sleep(10)
        assert a.num_connections("b") == b.num_connections("a") == 1
        for channel in lost:
            with pytest.raises(trio.WouldBlock):
                channel.receive_nowait()
        await b.disconnect("a")
        assert await lost[0].receive() == "b"


async def test_who_is_dialled_is_met_first(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        b.register("x.echo", echo)
        wires.gates["a"].denied.add("b")

        async def meet(peer):
            wires.gates["a"].denied.discard(peer)

        a.meet = meet
        assert await a.call("b", "x.echo", b"") == b"a:"


async def test_dial_failures_reach_every_caller_and_a_hanging_dial_is_bounded(
    autojump_clock,
):
    async with mesh("a") as wires:
        a = wires.services["a"]
        with pytest.raises(Unavailable, match="no path"):
            await a.call("nobody", "x", b"")
        wires.hold = trio.Event()
        failures = []

        async def call():
            try:
                await a.call("nobody", "x", b"")
            except PeerTimeout as exc:
                failures.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            nursery.start_soon(call)
        assert len(failures) == 2
        assert wires.dials == 2


async def test_misuse_is_our_error():
    async with mesh("a") as wires:
        a = wires.services["a"]
        a.register("x", echo)
        with pytest.raises(LocalProtocolError):
            a.register_async("x", hang)
        with pytest.raises(LocalProtocolError, match="ourselves"):
            await a.call("a", "x", b"")


async def test_callers_error_leaves_as_itself(autojump_clock):
    with pytest.raises(FabricError, match="mine"):
        async with mesh("a"):
            raise FabricError("mine")
