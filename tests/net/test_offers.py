"""Offer messages and the table of labels."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.errors import (
    ConfigError,
    RemoteProtocolError,
    RemoteRefused,
    ResourceExhausted,
    Unavailable,
)
from fabric.net.offers import (
    OFFER_REPLY,
    OFFER_REQUEST,
    ForBulk,
    ForJob,
    ForRpc,
    Offer,
    OfferGranted,
    OfferRefused,
    OfferRequest,
    OfferTable,
    format_address,
    ip_of_multiaddr,
    parse_address_untrusted,
    parse_listen,
)


def table():
    return OfferTable(life_seconds=30.0, max_offers=3, max_per_peer=2)


def offer(peer="a"):
    return Offer(peer, ForRpc(), b"", None)


def test_a_label_works_once():
    t = table()
    t.add(b"x", offer(), 0.0)
    assert t.redeem(b"x", 29.9) == offer()
    with pytest.raises(RemoteProtocolError, match="used"):
        t.redeem(b"x", 29.9)


def test_a_label_expires():
    t = table()
    t.add(b"x", offer(), 0.0)
    with pytest.raises(RemoteProtocolError):
        t.redeem(b"x", 30.0)
    assert len(t) == 0


def test_labels_are_bounded_per_peer_and_in_all_and_room_comes_back():
    t = table()
    t.add(b"1", offer(), 0.0)
    t.add(b"2", offer(), 1.0)
    with pytest.raises(ResourceExhausted):
        t.add(b"3", offer(), 1.0)
    t.add(b"4", offer("b"), 1.0)
    with pytest.raises(ResourceExhausted):
        t.add(b"5", offer("c"), 1.0)
    t.add(b"5", offer("c"), 30.0)  # the first expired
    t.forget("a")
    with pytest.raises(RemoteProtocolError):
        t.redeem(b"2", 30.0)
    assert len(t) == 2
    assert t._count == {"b": 1, "c": 1}


@pytest.mark.parametrize("purpose", [ForRpc(), ForBulk("s"), ForJob("j", 3, "c")])
def test_messages_round_trip(purpose):
    request = OfferRequest(purpose, b"der")
    assert OFFER_REQUEST.decode_untrusted(OFFER_REQUEST.encode(request)) == request
    reply = OfferGranted(b"l" * 16, b"der", ("1.2.3.4:5",))
    assert OFFER_REPLY.decode_untrusted(OFFER_REPLY.encode(reply)) == reply


def test_refusals_come_back_as_the_error_a_caller_acts_on():
    full = OfferRefused.of(ResourceExhausted("full", code="E_BUSY")).as_error()
    assert isinstance(full, Unavailable)
    no = OfferRefused.of(RemoteRefused("no", code="E_NO", next_step="ask")).as_error()
    assert isinstance(no, RemoteRefused)
    assert (no.code, no.reason, no.next_step) == ("E_NO", "no", "ask")


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_door_any_bytes(data):
    for codec in (OFFER_REQUEST, OFFER_REPLY):
        with suppress(RemoteProtocolError):
            codec.decode_untrusted(data)


def test_addresses():
    assert parse_address_untrusted("127.0.0.1:80") == ("127.0.0.1", 80)
    assert parse_address_untrusted("[::1]:80") == ("::1", 80)
    assert format_address("::1", 80) == "[::1]:80"
    assert format_address("1.2.3.4", 80) == "1.2.3.4:80"
    assert ip_of_multiaddr("/ip4/1.2.3.4/tcp/1/p2p/x") == "1.2.3.4"
    assert ip_of_multiaddr("/ip4/1.2.3.4/tcp/1/p2p/x/p2p-circuit") is None
    assert ip_of_multiaddr("/memory/x") is None
    with pytest.raises(ConfigError) as info:
        parse_listen("localhost")
    assert "IP:PORT" in info.value.next_step


@pytest.mark.parametrize(
    "text",
    ["", ":", "1.2.3.4", "1.2.3.4:", "host:80", "1.2.3.4:99999", "1.2.3.4:\u0663"],
)
def test_bad_addresses_are_protocol_errors(text):
    with pytest.raises(RemoteProtocolError):
        parse_address_untrusted(text)
