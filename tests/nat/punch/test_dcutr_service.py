"""DCUtR between real hosts of this machine; NATs are in test_punch_lab.py."""

from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import PROTOCOL_ERRORS, REFUSALS, Counters
from fabric.net.config import HostConfig
from fabric.net.delimited import receive_message_untrusted
from fabric.net.libp2p_host import open_host
from fabric.net.traversal_api import ConnectionInfo
from nat.multiaddr_bytes import tcp_endpoint
from nat.punch.config import PunchConfig
from nat.punch.dcutr_round_service import ControlSurroundings
from nat.punch.dcutr_service import DcutrService
from nat.punch.messages import (
    CONNECT,
    MAX_DCUTR_BYTES,
    PROTOCOL_DCUTR,
    SYNC,
    HolePunch,
    decode_hole_punch_untrusted,
    encode_hole_punch,
)
from tests.net.check_host import ListGate, resident_bytes

pytestmark = pytest.mark.slow
QUICK = PunchConfig(
    punch_seconds=0.3, dcutr_attempts=1, relay_grace_seconds=0.2, inbound_burst=3
)


async def until(condition, seconds=10):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


class End:
    def __init__(self, host, config, observed):
        self.host, self.peer = host, host.peer_id
        self.counters = Counters()
        addrs = host.listen_addrs()
        self.observed = addrs if observed is None else observed
        self.port = tcp_endpoint(addrs[0])[1]
        around = ControlSurroundings(
            port=lambda: self.port,
            observed=lambda: self.observed,
            local_ips=lambda: (),
            announced=lambda _: (),
            settled=lambda: self.settled,
        )
        self.settled = True
        self.service = DcutrService(host, config, around, self.counters)

    def kinds(self, other):
        return [info.kind for info in self.host.connections(other.peer)]


@asynccontextmanager
async def relayed(config=QUICK, observed=None, services=True):
    """Yield the end that dialled the relay and the one that was dialled."""
    async with open_end(config, observed) as one, open_end(config, observed) as two:
        near, far = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            if services:
                await nursery.start(one.service.run)
                await nursery.start(two.service.run)
            async with trio.open_nursery() as joining:
                for end, other, stream, outbound in (
                    (one, two, near, True),
                    (two, one, far, False),
                ):
                    info = ConnectionInfo(kind="relay", outbound=outbound)
                    joining.start_soon(end.host.adopt, other.peer, stream, info)
            yield one, two
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_end(config, observed):
    settings = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    signer = Ed25519Signer.generate()
    async with open_host(settings, signer, ListGate(), Counters()) as host:
        yield End(host, config, observed)


async def receive(stream):
    body = await receive_message_untrusted(stream, MAX_DCUTR_BYTES)
    return decode_hole_punch_untrusted(body)


async def test_a_relayed_connection_is_replaced_and_then_closed():
    async with relayed() as (one, two):
        await until(lambda: one.host.connections(two.peer)[0].kind != "relay")
        await until(lambda: two.host.connections(one.peer)[0].kind != "relay")
        assert one.host.connections(two.peer)[0].outbound  # DCUtR, step 5
        assert not two.host.connections(one.peer)[0].outbound
        await until(lambda: "relay" not in one.kinds(two), seconds=15)
        await until(lambda: "relay" not in two.kinds(one), seconds=15)
        assert one.host.connected() == {two.peer}
        assert two.service.reason(one.peer) == ""


@pytest.mark.parametrize("late", ["dialled", "dialling"])
async def test_nobody_punches_before_both_know_their_address(late):
    """A punch from one side alone opens a mapping that spoils the next."""
    # the punch may take long on a busy machine; that it is tried is what comes soon
    async with (
        relayed(PunchConfig(), services=False) as (one, two),
        trio.open_nursery() as nursery,
    ):
        end = two if late == "dialled" else one
        end.settled = False
        await nursery.start(one.service.run)
        await nursery.start(two.service.run)
        await until(lambda: "how" in two.service.reason(one.peer))
        assert one.kinds(two) == ["relay"]
        end.settled = True
        await until(lambda: one.kinds(two)[0] != "relay", seconds=20)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_admits_us_late_is_asked_again_soon():
    async with (
        relayed(PunchConfig(), services=False) as (one, two),
        trio.open_nursery() as nursery,
    ):
        one.host.gate.refused.add((two.peer, PROTOCOL_DCUTR))
        await nursery.start(one.service.run)
        await nursery.start(two.service.run)
        await until(lambda: "does not serve" in two.service.reason(one.peer))
        one.host.gate.refused.clear()
        await until(lambda: one.kinds(two)[0] != "relay", seconds=4)
        await until(lambda: two.service.reason(one.peer) == "")
        nursery.cancel_scope.cancel()


async def test_what_cannot_be_upgraded_stays_and_says_why():
    async with relayed(observed=()) as (one, two):
        await until(lambda: two.service.reason(one.peer))
        assert "no connection crossed" in two.service.reason(one.peer)
        assert one.kinds(two) == two.kinds(one) == ["relay"]


async def test_the_exchange_is_the_one_of_the_specification():
    """We play the dialled side by hand, as a go or rust peer would."""
    async with relayed(services=False) as (one, two), trio.open_nursery() as nursery:
        await nursery.start(one.service.run)
        with trio.fail_after(5):
            stream = await two.host.open_stream(one.peer, PROTOCOL_DCUTR)
            await stream.send_all(encode_hole_punch(HolePunch(CONNECT, two.observed)))
            answer = await receive(stream)
            assert answer == HolePunch(CONNECT, one.observed)
            await stream.send_all(encode_hole_punch(HolePunch(SYNC)))
        # it dials at once, as the client, and our listener takes it
        await until(lambda: "direct" in two.kinds(one))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x81\x20",
        b"\x02\x08\x01",
        encode_hole_punch(HolePunch(SYNC)),
        b"\x03\xff\xff\xff",
    ],
)
async def test_malformed_messages_are_counted(data):
    async with relayed(observed=()) as (one, two):
        stream = await two.host.open_stream(one.peer, PROTOCOL_DCUTR)
        await stream.send_all(data)
        counter = f"{PROTOCOL_ERRORS}:dcutr"
        await until(lambda: one.counters.snapshot().get(counter) == 1)


async def test_a_victim_that_is_named_again_and_again_hears_little():
    """It listens where we may dial, and is not who the CONNECT says."""
    config = PunchConfig(punch_seconds=0.3, dcutr_attempts=1, inbound_burst=3)
    heard = []

    async def victim(stream):
        heard.append(0)
        async for data in stream:
            heard[-1] += len(data)

    async with relayed(config, services=False) as (one, two):
        async with trio.open_nursery() as nursery:
            await nursery.start(one.service.run)
            ears, *_ = await nursery.start(
                partial(trio.serve_tcp, victim, 0, host="127.0.0.1")
            )
            addr = f"/ip4/127.0.0.1/tcp/{ears.socket.getsockname()[1]}"
            before = resident_bytes()
            with trio.fail_after(20):
                async with trio.open_nursery() as asking:
                    for _ in range(30):
                        asking.start_soon(ask_to_dial, two, one, (addr,) * 8)
            counted = one.counters.snapshot()
            assert resident_bytes() - before < 16 << 20  # of both ends
            nursery.cancel_scope.cancel()
    assert counted[f"{REFUSALS}:E_PUNCH_BUSY"] >= 30 - 4
    assert 1 <= len(heard) <= 4  # one connection of each punch that was let in
    assert sum(heard) <= 100 * len(heard)  # a greeting that a victim does not answer


async def ask_to_dial(end, other, addrs):
    """Do what the side that was dialled does, and name ``addrs`` as ours."""
    stream = await end.host.open_stream(other.peer, PROTOCOL_DCUTR)
    try:
        await stream.send_all(encode_hole_punch(HolePunch(CONNECT, addrs)))
        while await stream.receive_some():
            await stream.send_all(encode_hole_punch(HolePunch(SYNC)))
    except trio.BrokenResourceError:
        pass
    await stream.aclose()


async def test_a_spoofed_connect_is_not_dialled_and_not_repeated_for_ever():
    victims = ("/ip4/10.1.2.3/tcp/8080", "/ip4/224.0.0.1/tcp/9000")
    config = PunchConfig(punch_seconds=0.1, dcutr_attempts=1, inbound_burst=3)
    async with relayed(config, services=False) as (one, two):
        async with trio.open_nursery() as nursery:
            await nursery.start(one.service.run)
            for _ in range(4):
                stream = await two.host.open_stream(one.peer, PROTOCOL_DCUTR)
                await stream.send_all(encode_hole_punch(HolePunch(CONNECT, victims)))
                with trio.move_on_after(2):
                    while await stream.receive_some():
                        await stream.send_all(encode_hole_punch(HolePunch(SYNC)))
            counted = one.counters.snapshot()
            nursery.cancel_scope.cancel()
    assert counted[f"{REFUSALS}:punch_target"] == 3 * len(victims)
    assert counted[f"{REFUSALS}:E_PUNCH_BUSY"] == 1
