from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import trio
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed

from fabric.core.errors import ResourceExhausted
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import BUGS, DROPPED, REFUSALS, Counters
from fabric.net.config import GossipConfig, HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_pubsub import MAX_TOPICS, MESHSUB, open_broadcast
from tests.net.check_host import ListGate

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
pytestmark = pytest.mark.slow


@asynccontextmanager
async def mesh(count, config=None):
    """Yield ``count`` connected (host, gossip) pairs."""
    async with AsyncExitStack() as stack:
        pairs = []
        for _ in range(count):
            host = await stack.enter_async_context(
                open_host(LOOPBACK, Ed25519Signer.generate(), ListGate(), Counters())
            )
            gossip = await stack.enter_async_context(open_broadcast(host, config))
            for other, _ in pairs:
                await host.connect(other.peer_id, other.addrs())
            pairs.append((host, gossip))
        yield pairs


async def until(condition):
    """Poll ``condition`` for at most 5 s."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  # counters have no event
            await trio.sleep(0.01)


def drain(channel):
    """Return the payloads that wait in ``channel``."""
    got = []
    with suppress(trio.WouldBlock):
        while True:
            got.append(channel.receive_nowait()[1])
    return got


async def publish_until(gossip, topic, payloads, channel):
    """Publish a new payload every 50 ms until ``channel`` has something."""
    with trio.fail_after(10):
        for payload in payloads:
            await gossip.publish(topic, payload)
            with trio.move_on_after(0.05):
                return await channel.receive()
    raise AssertionError("nothing arrived")


def numbered():
    return (b"%d" % n for n in range(200))


async def test_every_subscriber_gets_a_message_once_and_knows_who_forwarded():
    async with mesh(4) as pairs:
        channels = [gossip.subscribe("t") for _, gossip in pairs]
        for i, channel in enumerate(channels[1:]):
            payloads = (b"%d %d" % (i, n) for n in range(200))
            await publish_until(pairs[0][1], "t", payloads, channel)
        await pairs[0][1].publish("t", b"marker")
        peers = {host.peer_id for host, _ in pairs}
        for (host, _), channel in zip(pairs[1:], channels[1:], strict=True):
            got = []
            with trio.fail_after(5):
                while not got or got[-1] != b"marker":
                    forwarder, payload = await channel.receive()
                    assert forwarder in peers - {host.peer_id}
                    got.append(payload)
            assert len(set(got)) == len(got)
        assert drain(channels[0]) == []  # the publisher does not hear itself


async def test_a_neighbour_that_is_not_admitted_is_not_heard_and_not_told():
    async with mesh(2) as ((one, mine), (two, theirs)):
        heard, echo = theirs.subscribe("t"), mine.subscribe("t")
        await publish_until(mine, "t", numbered(), heard)
        await publish_until(theirs, "t", (b"e%d" % n for n in range(200)), echo)
        two.gate.refused.add((one.peer_id, "/fabric/gossip/1"))
        drain(heard)
        await mine.publish("t", b"unwelcome")
        refused = f"{REFUSALS}:E_GOSSIP_NOT_ADMITTED"
        await until(lambda: two.counters.snapshot().get(refused))
        assert drain(heard) == []
        await theirs.publish("t", b"secret")
        two.gate.refused.clear()
        await publish_until(mine, "t", (b"again%d" % n for n in range(200)), heard)
        assert b"secret" not in drain(echo)


async def test_a_flood_is_cut_to_the_rate_and_a_full_channel_drops():
    config = GossipConfig(max_messages_per_second=6, subscriber_messages=8)
    async with mesh(2, config) as ((_, mine), (two, theirs)):
        heard = theirs.subscribe("t")
        mine.subscribe("t")
        await publish_until(mine, "t", numbered(), heard)
        for number in range(20):
            await mine.publish("t", b"flood%d" % number)
        await until(lambda: two.counters.snapshot().get(f"{DROPPED}:gossip_rate"))
        assert two.counters.snapshot()[f"{DROPPED}:gossip"] > 0
        assert len(drain(heard)) == 8


async def test_bounds():
    async with mesh(1) as ((_, gossip),):
        with pytest.raises(ValueError, match="65537"):
            await gossip.publish("t", bytes(65537))
        for number in range(MAX_TOPICS):
            gossip.subscribe(f"topic {number}")
        with pytest.raises(ResourceExhausted):
            gossip.subscribe("one more")


async def test_gossip_reaches_peers_connected_before_it_ran_and_big_payloads_pass():
    async with AsyncExitStack() as stack:
        one, two = [
            await stack.enter_async_context(
                open_host(LOOPBACK, Ed25519Signer.generate(), ListGate(), Counters())
            )
            for _ in "12"
        ]
        await one.connect(two.peer_id, two.addrs())
        mine = await stack.enter_async_context(open_broadcast(one))
        theirs = await stack.enter_async_context(open_broadcast(two))
        heard = theirs.subscribe("t")
        big = (n.to_bytes(2, "big") * 32768 for n in range(200))
        forwarder, payload = await publish_until(mine, "t", big, heard)
        assert forwarder == one.peer_id
        assert len(payload) == 65536


async def test_a_peer_whose_gossip_starts_later_is_found():
    config = GossipConfig(repair_seconds=0.1)
    async with AsyncExitStack() as stack:
        one, two = [
            await stack.enter_async_context(
                open_host(LOOPBACK, Ed25519Signer.generate(), ListGate(), Counters())
            )
            for _ in "12"
        ]
        mine = await stack.enter_async_context(open_broadcast(one, config))
        await one.connect(two.peer_id, two.addrs())
        with trio.move_on_after(0.3):  # ours is refused meanwhile
            await trio.sleep_forever()
        theirs = await stack.enter_async_context(open_broadcast(two, config))
        heard, echo = theirs.subscribe("t"), mine.subscribe("t")
        await publish_until(mine, "t", (b"a%d" % n for n in range(200)), heard)
        await publish_until(theirs, "t", (b"b%d" % n for n in range(200)), echo)


async def test_gossip_goes_on_after_a_reconnect():
    async with mesh(2) as ((one, mine), (two, theirs)):
        heard = theirs.subscribe("t")
        mine.subscribe("t")
        await publish_until(mine, "t", (b"a%d" % n for n in range(200)), heard)
        await one.disconnect(two.peer_id)
        await until(lambda: not two.connected())
        await two.connect(one.peer_id, one.addrs())
        drain(heard)
        await publish_until(mine, "t", (b"b%d" % n for n in range(200)), heard)


def nasty_packets():
    """Packets that a neighbour with its own code might send."""
    yield b"\xff" * 100
    yield b"\x0a\xff\xff\xff\xff\x0f"
    for field in ("from_id", "seqno", "key", "signature", "data"):
        message = rpc_pb2.Message(topicIDs=["t"], **{field: b"\xff\x00junk"})
        yield rpc_pb2.RPC(publish=[message]).SerializeToString()
    good_key = Ed25519Signer.generate().public_key
    message = rpc_pb2.Message(
        topicIDs=["t"],
        from_id=b"\x12\x20" + good_key,
        key=b"\x08\x01\x12\x20" + good_key,
    )
    yield rpc_pb2.RPC(publish=[message]).SerializeToString()
    yield rpc_pb2.RPC(senderRecord=b"junk").SerializeToString()
    control = rpc_pb2.ControlMessage(
        iwant=[rpc_pb2.ControlIWant(messageIDs=[b"x", b"[1,"])],
        ihave=[rpc_pb2.ControlIHave(topicID="t", messageIDs=[b"(", b"__import__"])],
        graft=[rpc_pb2.ControlGraft(topicID="nowhere")],
        prune=[rpc_pb2.ControlPrune(topicID="t", backoff=2**40)],
    )
    yield rpc_pb2.RPC(control=control).SerializeToString()
    subscriptions = [
        rpc_pb2.RPC.SubOpts(subscribe=True, topicid=f"{n}") for n in range(1000)
    ]
    yield rpc_pb2.RPC(subscriptions=subscriptions).SerializeToString()


async def test_nasty_packets_do_not_end_gossip():
    async with mesh(2) as ((one, mine), (two, theirs)):
        heard = theirs.subscribe("t")
        mine.subscribe("t")
        await publish_until(mine, "t", (b"a%d" % n for n in range(200)), heard)
        for packet in nasty_packets():
            stream = await one.open_raw(two.peer_id, MESHSUB)
            await stream.write(encode_varint_prefixed(packet))
            await stream.close()
        stream = await one.open_raw(two.peer_id, MESHSUB)
        await stream.write(b"\xff" * 9 + b"\x01")  # a packet of 2^63 bytes
        drain(heard)
        await publish_until(mine, "t", (b"b%d" % n for n in range(200)), heard)
        assert two.counters.snapshot().get(BUGS, 0) == 0
