import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.errors import RemoteProtocolError
from nat.portmap import pcp, pmp
from nat.portmap.timing import (
    MAX_PAUSE_SECONDS,
    PMP_FIRST_SECONDS,
    EpochClock,
    Retransmission,
)

PORTS = st.integers(0, 65535)
SECONDS = st.integers(0, 2**32 - 1)
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
NONCES = st.binary(min_size=12, max_size=12)


def pcp_answer(result=0, life=120, epoch=7, nonce=bytes(12), protocol=6, opcode=0x81):
    head = bytes([2, opcode, 0, result]) + life.to_bytes(4, "big")
    head += epoch.to_bytes(4, "big") + bytes(12)
    body = nonce + bytes([protocol, 0, 0, 0, 0x0F, 0xA1, 0x0F, 0xA2])
    return head + body + pcp.pack_address("198.51.100.1")


def test_pcp_request_is_byte_for_byte_that_of_the_standard():
    packet = pcp.encode_map(
        pcp.MapRequest(
            client="192.168.1.7",
            nonce=bytes(range(12)),
            internal_port=4001,
            external_port=4002,
            external_ip="",
            lifetime=3600,
        )
    )
    assert packet.hex() == (
        "02010000" "00000e10"  # version, MAP, reserved; lifetime
        "00000000000000000000ffffc0a80107"  # our address, IPv4-mapped
        "000102030405060708090a0b"  # nonce
        "06000000" "0fa1" "0fa2"  # TCP; ports
        "00000000000000000000ffff00000000"  # any IPv4 address
    )  # fmt: skip


def test_pcp_answers():
    answer = pcp.decode_untrusted(pcp_answer(nonce=b"n" * 12))
    assert answer == pcp.MapAnswer(
        result=0,
        lifetime=120,
        epoch=7,
        nonce=b"n" * 12,
        internal_port=4001,
        external_port=4002,
        external_ip="198.51.100.1",
    )
    announced = pcp_answer(opcode=0x80)[:24]
    assert pcp.decode_untrusted(announced) == pcp.Announcement(epoch=7)


@pytest.mark.parametrize(
    ("data", "version"),
    [
        (bytes.fromhex("0081000100000007"), 0),  # a NAT-PMP server
        (bytes.fromhex("00810001"), 0),
        (bytes([1]) + pcp_answer()[1:], 1),
        (pcp_answer(result=1), 2),
    ],
)
def test_pcp_other_version(data, version):
    assert pcp.decode_untrusted(data) == pcp.VersionRefused(version)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        pcp_answer()[:59],
        pcp_answer(protocol=17),
        pcp_answer(opcode=0x82),
        pcp_answer(opcode=0x01),
        pcp_answer() + bytes(1100),
    ],
)
def test_pcp_refuses(data):
    with pytest.raises(RemoteProtocolError):
        pcp.decode_untrusted(data)


@given(st.binary(max_size=1200))
def test_pcp_door(data):
    try:
        answer = pcp.decode_untrusted(data)
    except RemoteProtocolError:
        return
    assert isinstance(answer, pcp.Answer)


@given(ADDRESSES)
def test_addresses_round_trip(address):
    there = pcp.pack_address(address)
    back = pcp.unpack_address(there)
    assert pcp.pack_address(back) == there


@given(
    st.builds(
        pcp.MapRequest,
        client=ADDRESSES,
        nonce=NONCES,
        internal_port=PORTS,
        external_port=PORTS,
        external_ip=ADDRESSES,
        lifetime=SECONDS,
    )
)
def test_pcp_request_reads_back_as_an_answer(request):
    packet = bytearray(pcp.encode_map(request))
    assert len(packet) == 60
    packet[1] |= 0x80
    packet[3] = 0
    answer = pcp.decode_untrusted(bytes(packet))
    assert isinstance(answer, pcp.MapAnswer)
    assert answer.lifetime == request.lifetime
    assert answer.nonce == request.nonce
    assert answer.internal_port == request.internal_port
    assert answer.external_port == request.external_port


def test_pmp_requests():
    assert pmp.encode_address_request().hex() == "0000"
    assert pmp.encode_map(4001, 4002, 3600).hex() == "000200000fa10fa200000e10"


def test_pmp_answers():
    address = pmp.decode_untrusted(bytes.fromhex("0080000000000007c6336401"))
    assert address == pmp.AddressAnswer(result=0, epoch=7, external_ip="198.51.100.1")
    refused = pmp.decode_untrusted(bytes.fromhex("0080000300000007"))
    assert (refused.result, refused.external_ip) == (3, "")
    mapped = bytes.fromhex("00820000000000070fa10fa200000078")
    assert pmp.decode_untrusted(mapped) == pmp.MapAnswer(
        result=0, epoch=7, internal_port=4001, external_port=4002, lifetime=120
    )


@given(st.binary(max_size=64))
def test_pmp_door(data):
    try:
        answer = pmp.decode_untrusted(data)
    except RemoteProtocolError:
        return
    assert isinstance(answer, pmp.Answer)


@pytest.mark.parametrize(
    "data", ["", "0080", "0280000000000007c6336401", "00810000000000070fa10fa200000078"]
)
def test_pmp_refuses(data):
    with pytest.raises(RemoteProtocolError):
        pmp.decode_untrusted(bytes.fromhex(data))


@given(st.integers(0, 255))
def test_results_have_names(result):
    assert pcp.result_name(result)
    assert pmp.result_name(result)


@given(st.randoms(use_true_random=False), st.floats(0, 1e6))
def test_pauses_double_up_to_a_bound(rng, start):
    repeat, now = Retransmission(PMP_FIRST_SECONDS, start, rng), start
    pauses = []
    for _ in range(12):
        pauses.append(repeat.at - now)
        now = repeat.at
        repeat.sent(now)
    assert 0.2 < pauses[0] < 0.3
    growing = itertools.pairwise(pauses[:7])
    assert all(later > 1.5 * sooner for sooner, later in growing)
    assert max(pauses) <= MAX_PAUSE_SECONDS * 1.11


class TestEpochClock:
    def test_steady_clocks_lose_nothing(self):
        clock = EpochClock()
        assert not any(clock.lost_state(100 + t, 5.0 + t) for t in range(0, 7200, 600))

    def test_going_back_is_a_restart(self):
        clock = EpochClock()
        assert not clock.lost_state(500, 0.0)
        assert clock.lost_state(3, 100.0)
        assert not clock.lost_state(103, 200.0)

    def test_rounding_is_no_restart(self):
        clock = EpochClock()
        clock.lost_state(500, 0.0)
        assert not clock.lost_state(499, 0.5)

    def test_a_restart_long_ago_shows_as_a_slow_clock(self):
        clock = EpochClock()
        clock.lost_state(10, 0.0)
        assert clock.lost_state(500, 1000.0)

    @given(st.lists(st.tuples(SECONDS, st.floats(0, 1e9)), max_size=8))
    def test_any_epoch_is_judged(self, samples):
        clock = EpochClock()
        for epoch, now in samples:
            assert clock.lost_state(epoch, now) in (True, False)
