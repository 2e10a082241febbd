from contextlib import asynccontextmanager, suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.identity.identify.pb.identify_pb2 import Identify
from multiaddr import Multiaddr

from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.protobuf import encode_message
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.config import HostConfig
from fabric.net.libp2p_host import open_host
from fabric.net.libp2p_identify import (
    IDENTIFY_PROTOCOL,
    MAX_ADDRS,
    MAX_MESSAGE_BYTES,
    decode_identify_untrusted,
    identify,
)
from tests.net.check_host import ListGate


@asynccontextmanager
async def pair(listen="/ip4/127.0.0.1/tcp/0"):
    def host():
        config = HostConfig(listen=(listen,))
        return open_host(config, Ed25519Signer.generate(), ListGate(), Counters())

    with trio.fail_after(10):
        async with host() as one, host() as two:
            await one.connect(two.peer_id, two.addrs())
            while one.peer_id not in two.connected():  # noqa: ASYNC110
                await trio.sleep(0.01)
            yield one, two


def listening(host):
    parts = host.addrs()[0].split("/")
    return f"[{parts[2]}]:{parts[4]}" if ":" in parts[2] else f"{parts[2]}:{parts[4]}"


@pytest.mark.slow
@pytest.mark.parametrize("ip", ["/ip4/127.0.0.1", "/ip6/::1"])
async def test_a_real_peer_tells_our_true_address_at_that_connection(ip):
    async with pair(f"{ip}/tcp/0") as (one, two):
        answer = await identify(one, two.peer_id)
        assert answer.observed == answer.connection.local == listening(one)
        assert answer.connection.outbound
        assert IDENTIFY_PROTOCOL in answer.protocols
        assert two.addrs()[0].startswith(answer.addrs[0])
        assert answer.agent
        other_way = await identify(two, one.peer_id)
        assert other_way.observed == listening(two)
        assert not other_way.connection.outbound


@pytest.mark.slow
async def test_without_a_connection_it_says_so():
    async with pair() as (one, two):
        await one.disconnect(two.peer_id)
        with pytest.raises(Unavailable) as error:
            await identify(one, two.peer_id)
        assert error.value.code == "E_NOT_CONNECTED"


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        b"\x05ab",
        b"\xff" * 12,
        b"\xff\xff\xff\x7f" + b"x" * (2 * MAX_MESSAGE_BYTES),
        b"\x03\x12\xff\xff",
    ],
)
async def test_a_malformed_answer_is_the_peers_fault(answer):
    async def lie(stream):
        await stream.write(answer)

    async with pair() as (one, two):
        two.basic.set_stream_handler(IDENTIFY_PROTOCOL, lie)
        with pytest.raises(RemoteProtocolError):
            await identify(one, two.peer_id)


@pytest.mark.slow
async def test_no_answer_is_nobodys_fault():
    async def silent(stream):
        await stream.close()

    async with pair() as (one, two):
        two.basic.set_stream_handler(IDENTIFY_PROTOCOL, silent)
        with pytest.raises(Unavailable):
            await identify(one, two.peer_id)


def test_their_encoding_is_read():
    message = Identify(
        agent_version="js/1",
        observed_addr=Multiaddr("/ip4/192.0.2.1/tcp/4001").to_bytes(),
        listen_addrs=[Multiaddr(f"/ip4/192.0.2.1/tcp/{p}").to_bytes() for p in (1, 2)],
        protocols=["/a/1", "/b/2"],
    )
    got = decode_identify_untrusted(message.SerializeToString())
    assert got.observed == "192.0.2.1:4001"
    assert got.addrs == ("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.1/tcp/2")
    assert got.protocols == ("/a/1", "/b/2")
    assert got.agent == "js/1"


@pytest.mark.parametrize(
    "addr",
    ["/ip4/192.0.2.1/udp/1/quic-v1", "/ip4/192.0.2.1", "/ip4/192.0.2.1/tcp/1/ws"],
)
def test_an_observed_address_that_is_not_tcp_tells_nothing(addr):
    data = encode_message([(4, Multiaddr(f"/ip4/192.0.2.1{addr}").to_bytes())])
    assert decode_identify_untrusted(data).observed is None


@given(st.binary(max_size=300))
def test_the_door_takes_any_bytes(data):
    with suppress(RemoteProtocolError):
        decode_identify_untrusted(data)


@given(st.lists(st.tuples(st.integers(1, 7), st.binary(max_size=60)), max_size=40))
def test_any_fields_give_a_bounded_value(fields):
    try:
        got = decode_identify_untrusted(encode_message(fields))
    except RemoteProtocolError:
        return
    assert len(got.addrs) <= MAX_ADDRS
    assert all(isinstance(text, str) for text in (*got.addrs, *got.protocols))
