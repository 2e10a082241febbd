import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.host.autonat.pb.autonat_pb2 import Message
from multiaddr import Multiaddr

from fabric.core.errors import RemoteProtocolError
from fabric.core.protobuf import encode_message
from fabric.core.signing import Ed25519Signer
from nat.addresses import AddressClass, classify, endpoint_of
from nat.reachability.autonat import (
    MAX_DATA_BYTES,
    MAX_PENDING,
    MIN_DATA_BYTES,
    NONCE_SECONDS,
    AutonatClient,
    AutonatServer,
    judge_v1,
)
from nat.reachability.autonat_limits import MAX_KEYS, RequestLimits
from nat.reachability.autonat_messages import (
    DialData,
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialStatus,
    DialV1,
    ResponseStatus,
    ResponseV1,
    StatusV1,
    decode_dial_back_untrusted,
    decode_dial_v1_untrusted,
    decode_response_v1_untrusted,
    decode_v2_untrusted,
    encode_dial_back,
    encode_dial_v1,
    encode_response_v1,
    encode_v2,
)
from nat.reachability.config import AutonatConfig

ASKER = Ed25519Signer.generate().peer_id
ASKER_IP = "203.0.113.1"
OWN = f"/ip4/{ASKER_IP}/tcp/4801"
VICTIM = "/ip4/198.51.100.66/tcp/80"


def server(**limits):
    return AutonatServer(AutonatConfig(**limits), random.Random(1).randrange)


def choose(addrs, ip=ASKER_IP):
    return server().choose(DialRequest(tuple(addrs), 1), ip, 0.0)


def test_the_first_address_that_may_be_dialled_is():
    target = choose([None, "/ip4/10.0.0.1/tcp/1", OWN, VICTIM])
    assert (target.index, target.ip, target.port) == (2, ASKER_IP, 4801)
    assert target.data_bytes == 0


def test_another_ip_costs_dial_data():
    target = choose([VICTIM, OWN])
    assert target.index == 0
    assert MIN_DATA_BYTES <= target.data_bytes <= MAX_DATA_BYTES


@pytest.mark.parametrize(
    "addr",
    [
        "/ip4/127.0.0.1/tcp/22",
        "/ip4/192.168.1.1/tcp/80",
        "/ip4/169.254.169.254/tcp/80",
        "/ip4/100.64.0.1/tcp/80",
        "/ip4/255.255.255.255/tcp/80",
        "/ip4/224.0.0.1/tcp/80",
        "/ip6/::1/tcp/80",
        "/ip6/::ffff:127.0.0.1/tcp/80",
        "/ip4/203.0.113.1/udp/80",
        f"{OWN}/p2p/{ASKER}/p2p-circuit",
    ],
    ids=lambda addr: addr.replace(ASKER, "asker"),
)
def test_what_does_not_reach_as_far_as_the_asker_is_not_dialled(addr):
    assert choose([addr]) is None


def test_a_neighbour_may_ask_about_itself_and_nobody_else():
    assert choose(["/ip4/10.0.0.5/tcp/1"], "10.0.0.5") is not None
    assert choose(["/ip4/10.0.0.6/tcp/1"], "10.0.0.5") is None
    assert choose(["/ip4/127.0.0.2/tcp/1"], "127.0.0.1").data_bytes > 0


def test_v1_dials_the_askers_own_ip_and_few_ports_of_it():
    addrs = [VICTIM, *(f"/ip4/{ASKER_IP}/tcp/{port}" for port in range(1, 9))]
    targets = server().choose_v1(DialV1(ASKER, tuple(addrs)), ASKER, ASKER_IP)
    assert [target.port for target in targets] == [1, 2, 3]
    other = Ed25519Signer.generate().peer_id
    assert not server().choose_v1(DialV1(other, tuple(addrs)), ASKER, ASKER_IP)


def test_a_flood_is_refused_per_peer_per_network_and_in_all():
    one = server(per_peer_minute=3, total_minute=8)
    assert [one.admit(ASKER, ASKER_IP, 0.0) for _ in range(5)] == [True] * 3 + [
        False
    ] * 2
    assert not one.admit("another", ASKER_IP, 1.0)
    six = [one.admit(f"peer{n}", f"2001:db8::{n}", 2.0) for n in range(6)]
    assert six == [True] * 3 + [False] * 3  # one /64
    assert [one.admit(f"p{n}", f"192.0.2.{n}", 3.0) for n in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert one.admit(ASKER, ASKER_IP, 61.0)


def test_foreign_dials_have_a_limit_of_their_own():
    one = server(data_minute=2)
    request = DialRequest((VICTIM,), 1)
    chosen = [one.choose(request, f"192.0.2.{n}", 0.0) for n in range(4)]
    assert [target is not None for target in chosen] == [True, True, False, False]


@pytest.mark.slow
@given(st.lists(st.tuples(st.text(max_size=3), st.floats(0, 300)), max_size=200))
def test_limits_hold_over_any_minute(requests):
    limits = RequestLimits(3, 10)
    served = []
    now = 0.0
    for key, step in requests:
        now += step / 10
        if limits.admit((key,), now):
            served.append((key, now))
        recent = [each for each in served if now - each[1] < 60]
        assert len(recent) <= 10
        assert all([k for k, _ in recent].count(k) <= 3 for k, _ in recent)
    assert len(limits._counts) <= MAX_KEYS


addr_texts = st.builds(
    lambda ip, port: f"/ip{ip.version}/{ip}/tcp/{port}",
    st.ip_addresses(),
    st.integers(1, 65535),
)


@pytest.mark.slow
@given(
    st.lists(st.one_of(st.none(), addr_texts), max_size=8), st.ip_addresses().map(str)
)
def test_nobody_gets_a_stranger_dialled_for_free(addrs, asker_ip):
    target = choose(addrs, asker_ip)
    if target is None:
        return
    assert str(endpoint_of(addrs[target.index])[0]) == target.ip
    if target.ip != asker_ip:
        assert target.data_bytes >= MIN_DATA_BYTES
        public = classify(target.ip) is AddressClass.PUBLIC
        assert public or classify(asker_ip) is classify(target.ip)


# the client


def asked(addrs=(OWN,)):
    client = AutonatClient(random.Random(7).getrandbits)
    return client, client.request(addrs, 0.0)


OK = DialResponse(ResponseStatus.OK, 0, DialStatus.OK)
FAILED = DialResponse(ResponseStatus.OK, 0, DialStatus.E_DIAL_ERROR)


def test_reached_is_what_the_nonce_proves():
    client, request = asked()
    assert client.judge(request, OK).reached is None
    assert client.on_dial_back(request.nonce, dialled_in=True)
    verdict = client.judge(request, OK)
    assert verdict.reached is True
    assert verdict.proven
    assert client.judge(request, FAILED).reached is None  # it contradicts itself


def test_a_nonce_on_a_connection_that_we_dialled_proves_nothing():
    client, request = asked()
    assert not client.on_dial_back(request.nonce, dialled_in=False)
    assert client.judge(request, OK).reached is None


def test_a_guessed_or_late_nonce_does_not_count():
    client, request = asked()
    assert not client.on_dial_back(request.nonce ^ 1, dialled_in=True)
    client.finish(request.nonce)
    assert not client.on_dial_back(request.nonce, dialled_in=True)


def test_a_failed_dial_is_unreachable_and_a_refusal_is_nothing():
    client, request = asked()
    assert client.judge(request, FAILED).reached is False
    for status in (ResponseStatus.E_REQUEST_REJECTED, ResponseStatus.E_DIAL_REFUSED):
        assert client.judge(request, DialResponse(status)).reached is None
    with pytest.raises(RemoteProtocolError):
        client.judge(request, DialResponse(ResponseStatus.OK, 1, DialStatus.OK))


def test_pending_nonces_are_bounded_and_expire():
    client = AutonatClient(random.Random(7).getrandbits)
    made = [client.request([OWN], 0.0) for _ in range(MAX_PENDING + 1)]
    assert made[-1] is None
    assert client.request([OWN], NONCE_SECONDS + 1) is not None


@pytest.mark.parametrize("ask", [DialDataRequest(1, 100), DialDataRequest(0, 10**9)])
def test_a_server_cannot_ask_for_any_amount(ask):
    client, request = asked()
    with pytest.raises(RemoteProtocolError):
        client.data_bytes(request, ask)
    assert client.data_bytes(request, DialDataRequest(0, 30_000)) == 30_000


def test_a_v1_failure_is_about_the_ip_the_server_saw():
    addrs = (OWN, VICTIM)
    failed = judge_v1(addrs, ResponseV1(StatusV1.E_DIAL_ERROR), ASKER_IP)
    assert [(v.address, v.reached) for v in failed] == [(OWN, False)]
    good = judge_v1(addrs, ResponseV1(StatusV1.OK, addr=OWN), ASKER_IP)
    assert [(v.address, v.reached, v.proven) for v in good] == [(OWN, True, False)]
    refused = judge_v1(addrs, ResponseV1(StatusV1.E_DIAL_REFUSED), ASKER_IP)
    assert all(v.reached is None for v in refused)


# messages


@pytest.mark.parametrize(
    "message",
    [
        DialRequest((OWN, VICTIM), 2**64 - 1),
        DialResponse(ResponseStatus.OK, 3, DialStatus.E_DIAL_BACK_ERROR),
        DialDataRequest(1, 65_000),
        DialData(4096),
    ],
)
def test_v2_messages_survive_the_wire(message):
    assert decode_v2_untrusted(encode_v2(message)) == message


def test_v1_messages_are_those_of_py_libp2p():
    theirs = Message()
    theirs.ParseFromString(encode_dial_v1(DialV1(ASKER, (OWN,))))
    assert theirs.type == Message.DIAL
    assert Multiaddr(theirs.dial.peer.addrs[0]) == Multiaddr(OWN)
    assert decode_dial_v1_untrusted(theirs.SerializeToString()) == DialV1(ASKER, (OWN,))
    answer = ResponseV1(StatusV1.OK, "fine", OWN)
    theirs = Message()
    theirs.ParseFromString(encode_response_v1(answer))
    assert theirs.dialResponse.status == Message.OK
    assert decode_response_v1_untrusted(theirs.SerializeToString()) == answer


def test_an_unknown_address_keeps_its_place():
    raw = [Multiaddr("/dns4/example.org/tcp/1").to_bytes(), Multiaddr(OWN).to_bytes()]
    inner = encode_message([(1, each) for each in raw])
    assert decode_v2_untrusted(encode_message([(1, inner)])).addrs == (None, OWN)


def test_a_status_that_we_do_not_understand_voids_the_response():
    inner = encode_message([(1, 999)])
    with pytest.raises(RemoteProtocolError):
        decode_v2_untrusted(encode_message([(2, inner)]))


@pytest.mark.parametrize(
    "door",
    [
        decode_v2_untrusted,
        decode_dial_back_untrusted,
        decode_dial_v1_untrusted,
        decode_response_v1_untrusted,
    ],
)
@given(data=st.binary(max_size=200), number=st.integers(1, 5))
def test_doors_take_any_bytes(door, data, number):
    for each in (data, encode_message([(number, data)])):
        try:
            door(each)
        except RemoteProtocolError:
            continue


@given(st.integers(0, 2**64 - 1))
def test_a_nonce_survives(nonce):
    assert decode_dial_back_untrusted(encode_dial_back(nonce)) == nonce
