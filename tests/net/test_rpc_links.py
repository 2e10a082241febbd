"""A peer whose path died dials anew: calls go on, whoever learns of it first."""

import pytest
import trio

from fabric.core.errors import PeerTimeout, Unavailable
from fabric.net.data_config import RpcConfig
from fabric.net.ports import ALL_PATHS
from fabric.net.rpc_liveness import Liveness
from tests.net.test_rpc import echo, mesh

CONFIG = RpcConfig()


def black_hole(wires):
    """Swallow what is sent on all streams so far; no end is told."""
    for stream in wires.streams:
        stream.send_stream.send_all_hook = None


async def dialled_anew(wires, one, other):
    """``one`` knows that its connection is dead and has another one."""
    service = wires.services[one]
    lost = service.lost()
    service._links.live(other).end(Unavailable("reset"))
    assert await lost.receive() == other
    await service.call(other, "x.echo", b"")


@pytest.mark.parametrize(("first", "then"), [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("kind", ["direct", "relay"])
async def test_calls_go_on_though_one_side_knows_nothing(
    autojump_clock, first, then, kind
):
    async with mesh("a", "b") as wires:
        services = wires.services
        for service in services.values():
            service.register("x.echo", echo)
        await services[first].call(then, "x.echo", b"")
        black_hole(wires)
        wires.kind = kind
        start = trio.current_time()
        await dialled_anew(wires, then, first)
        # the other side held on to the dead one: it must not prefer that
        assert await services[first].call(then, "x.echo", b"1") == b"%s:1" % (
            first.encode()
        )
        assert trio.current_time() - start < 0.1
        dials = wires.dials
        await trio.sleep(30)
        for here, there in ((first, then), (then, first)):
            assert services[here].kind(there) == kind
            await services[here].call(there, "x.echo", b"")
        assert wires.dials == dials, "what worked was kept"
        assert len(services["a"]._links) == len(services["b"]._links) == 1


async def test_a_better_connection_that_is_alive_is_kept(autojump_clock):
    async with mesh("a", "b") as wires:
        a, b = wires.services["a"], wires.services["b"]
        a.register("x.echo", echo)
        b.register("x.echo", echo)
        await a.call("b", "x.echo", b"")
        wires.kind = "relay"
        await b._adopt("a", *await wires.connector("b").connect("a", ALL_PATHS))
        await trio.sleep(0.01)
        assert a.kind("b") == b.kind("a") == "direct"
        await trio.sleep(30)
        assert len(a._links) == len(b._links) == 1
        assert a.kind("b") == b.kind("a") == "direct"


async def test_a_doubted_connection_ends_soon_or_stays(autojump_clock):
    async with mesh("a", "b", "c") as wires:
        a = wires.services["a"]
        for service in wires.services.values():
            service.register("x.echo", echo)
        await a.call("b", "x.echo", b"")
        black_hole(wires)
        await a.call("c", "x.echo", b"")
        lost, start = a.lost(), trio.current_time()
        a.doubt()
        assert await lost.receive() == "b"
        assert trio.current_time() - start <= CONFIG.doubt_seconds + 0.1
        assert a.connected() == {"c"}
        await trio.sleep(30)
        assert a.connected() == {"c"}


async def test_silence_is_told_before_it_is_death(autojump_clock):
    async with mesh("a", "b") as wires:
        wires.services["b"].register("x.echo", echo)
        a = wires.services["a"]
        await a.call("b", "x.echo", b"")
        await trio.sleep(1)
        assert not a.silent(2.0)
        black_hole(wires)
        await trio.sleep(3.5)
        assert a.silent(2.0) == a.connected() == {"b"}


def test_a_doubt_has_its_own_limit_and_any_byte_ends_it():
    live = Liveness(CONFIG, 0.0)
    ping = live.on_timeout(0.0, 0)
    live.on_received(0.1)
    live.on_pong(ping, 0.1)
    live.doubt(0.5)
    assert live.in_doubt
    assert live.next_timeout() == 0.5
    assert live.on_timeout(0.5, 0) == ping + 1, "asked at once"
    live.doubt(1.0)  # does not start anew
    live.on_timeout(2.4, 0)
    with pytest.raises(PeerTimeout, match="did not say"):
        live.on_timeout(2.5, 0)
    live.on_received(2.4)
    assert not live.in_doubt
    live.on_timeout(2.5, 0)


def test_a_doubt_waits_for_slow_paths_and_for_ourselves():
    slow = Liveness(CONFIG, 0.0)
    slow.rtt_seconds = 1.0
    slow.doubt(0.0)
    slow.on_timeout(3.9, 0)
    with pytest.raises(PeerTimeout):
        slow.on_timeout(4.0, 0)
    late = Liveness(CONFIG, 0.0)
    late.doubt(0.0)
    late.on_late(4.0)  # we were not run: its answer may wait unread
    late.on_timeout(4.0, 0)
    with pytest.raises(PeerTimeout):
        late.on_timeout(5.0, 0)
