"""Addresses are merged from everybody, bounded, and what worked is never lost."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.app.known_addrs import (
    MAX_ADDR_CHARS,
    MAX_ADDRS,
    MAX_HINTED,
    MAX_PROVEN,
    AddrBook,
    KnownAddr,
    addr_untrusted,
    answered,
)
from fabric.core.ids import PeerId
from fabric.net.traversal_api import ConnectionInfo

PEER = PeerId("12D3KooWPeer")
RELAY = PeerId("12D3KooWRelay")


def addr(port):
    return f"/ip4/192.0.2.1/tcp/{port}/p2p/{PEER}"


def test_a_record_with_dead_addresses_does_not_hide_one_that_worked():
    book = AddrBook(PEER)
    book.merge([addr(1)], "invite", 10)
    book.on_success([addr(1)], 20)
    for start in range(100, 1000, MAX_ADDRS):
        book.merge([addr(start + i) for i in range(MAX_ADDRS)], "record", 30)
    assert book.best()[0] == addr(1)
    assert len(book.best()) == MAX_ADDRS


def test_the_best_is_the_latest_success_then_the_latest_said():
    book = AddrBook(PEER)
    book.merge([addr(1), addr(2), addr(3)], "record", 10)
    book.merge([addr(4)], "observed", 11)
    book.on_success([addr(3)], 20)
    book.on_success([addr(2)], 30)
    assert book.best() == (addr(2), addr(3), addr(4), addr(1))


def test_hints_cannot_push_out_what_the_record_says():
    book = AddrBook(PEER)
    record = [addr(i) for i in range(1, 13)]
    book.merge(record, "record", 10)
    for start in range(100, 200, 10):
        book.merge([addr(start + i) for i in range(10)], "mdns", 20)
    assert set(record) <= set(book.best())
    assert len(book.best()) == len(record) + MAX_HINTED


def test_a_hint_that_the_record_confirms_is_a_hint_no_more():
    book = AddrBook(PEER)
    book.merge([addr(1)], "mdns", 10)
    book.merge([addr(1)], "record", 11)
    assert [known.source for known in book.all()] == ["record"]


def test_the_same_record_again_is_nothing_new():
    book = AddrBook(PEER)
    assert book.merge([addr(1)], "record", 10)
    assert not book.merge([addr(1)], "record", 99)
    assert book.all()[0].seen == 10


def test_what_an_earlier_run_knew_comes_after_what_is_said_now():
    book = AddrBook(PEER)
    book.restore([KnownAddr(addr=addr(1), source="record", seen=5)])
    book.merge([addr(2)], "record", 6)
    assert book.best() == (addr(2), addr(1))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("/ip4/192.0.2.1/tcp/1", f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}"),
        (addr(1), addr(1)),
        (
            f"/ip4/192.0.2.1/tcp/1/p2p/{RELAY}/p2p-circuit",
            f"/ip4/192.0.2.1/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
        ),
        (f"/ip4/192.0.2.1/tcp/1/p2p/{RELAY}", None),
        (f"/p2p/{PEER}", None),
        ("192.0.2.1:1", None),
        ("", None),
        ("/ip4/192.0.2.1/tcp/1 ", None),
        ("/ip4/\n/tcp/1", None),
        ("/dns4/b\u00fccher.example/tcp/1", None),
        ("/dns4/" + "a" * MAX_ADDR_CHARS + "/tcp/1", None),
        ("/dns4/" + "a" * (MAX_ADDR_CHARS - 20) + "/tcp/1", None),
    ],
)
def test_the_form_of_an_address(text, good):
    assert addr_untrusted(PEER, text) == good


@given(st.text(max_size=400))
def test_any_text_is_an_address_within_bounds_or_none(text):
    found = addr_untrusted(PEER, text)
    assert found is None or (
        len(found) <= MAX_ADDR_CHARS and found.endswith(f"/p2p/{PEER}")
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["invite", "record", "mdns", "rendezvous", "observed"]),
            st.lists(st.integers(1, 60), max_size=20),
            st.lists(st.integers(1, 60), max_size=3),
        ),
        max_size=30,
    )
)
def test_any_history_is_bounded_and_keeps_the_latest_successes(history):
    book, latest = AddrBook(PEER), {}
    for now, (source, told, worked) in enumerate(history, 1):
        book.merge([addr(port) for port in told], source, now)
        known = [addr(port) for port in worked if addr(port) in book.best()]
        book.on_success(known, now)
        latest |= dict.fromkeys(known, now)
    best = book.best()
    assert len(best) <= MAX_ADDRS
    recent = sorted(latest, key=lambda text: (-latest[text], text))
    newest = (
        {a for a in recent if latest[a] > sorted(latest.values())[-MAX_PROVEN]}
        if (len(latest) >= MAX_PROVEN)
        else set(recent)
    )
    assert newest <= set(best)


@given(st.lists(st.text(string.printable, max_size=40), max_size=40))
def test_garbage_is_left_out(texts):
    book = AddrBook(PEER)
    book.merge(texts, "rendezvous", 1)
    assert all(text.endswith(f"/p2p/{PEER}") for text in book.best())


def test_which_address_answered():
    circuit = f"/ip4/192.0.2.9/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{PEER}"
    six = f"/ip6/2001:db8::1/tcp/7/p2p/{PEER}"
    known = [addr(1), addr(2), circuit, six]

    def by(kind, remote="", *, outbound=True, relay=None):
        info = ConnectionInfo(kind=kind, outbound=outbound, remote=remote, relay=relay)
        return answered(known, [info])

    assert by("direct", "192.0.2.1:2") == (addr(2),)
    assert by("direct", "[2001:db8::1]:7") == (six,)
    assert by("direct", "192.0.2.1:2", outbound=False) == ()
    assert by("punched", "192.0.2.1:2") == ()
    assert by("relay", relay=RELAY) == (circuit,)
    assert by("direct", "192.0.2.9:1") == ()
