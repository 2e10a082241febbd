"""Peers survive a restart; a damaged file is reported, set aside, and stops nothing."""

import contextlib
import json
import os

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fabric.app.known_addrs import MAX_ADDRS, KnownAddr
from fabric.app.peer_book import MAX_PEERS, PeerBook
from fabric.app.peers_file import (
    E_PEERS_FILE,
    PeersFile,
    load_peers,
    parse_peers_untrusted,
    save_peers,
)
from fabric.core.errors import ConfigError, NoRoute, RemoteProtocolError
from fabric.core.ids import PeerId, peer_id_of

OWN, PEER = peer_id_of(bytes(32)), peer_id_of(b"1" * 32)
ADDR = f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}"
KNOWN = KnownAddr(
    addr=ADDR, source="record", seen=50.0, succeeded=40.0, successes=3, failures=1
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "peers.json"


def test_what_was_saved_is_loaded(path):
    save_peers(path, {PEER: (KNOWN,)})
    found = load_peers(path, 100.0)
    assert found.peers == {PEER: (KNOWN,)}
    assert found.problem is None
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_file_is_no_problem(path):
    assert load_peers(path, 0.0).problem is None


def test_times_in_the_future_are_cut(path):
    save_peers(path, {PEER: (KNOWN,)})
    (known,) = load_peers(path, 45.0).peers[PEER]
    assert (known.seen, known.succeeded) == (45.0, 40.0)


def damage(**change):
    entry = {"addr": ADDR, "source": "record"} | change.pop("entry", {})
    peer = {"peer": PEER, "addrs": [entry]} | change.pop("peer", {})
    return json.dumps({"version": 1, "peers": [peer]} | change).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        damage(version=2),
        damage(more=1),
        damage(peer={"peer": "nobody"}),
        damage(entry={"source": "dream"}),
        damage(entry={"addr": "no address"}),
        damage(entry={"addr": f"/ip4/192.0.2.1/tcp/1/p2p/{OWN}"}),
        damage(entry={"successes": -1}),
        damage(entry={"seen": 1e300}),
        damage(peer={"addrs": [{"addr": ADDR, "source": "record"}] * (MAX_ADDRS + 1)}),
        damage(peers=[{"peer": PEER, "addrs": []}] * (MAX_PEERS + 1)),
        b" " * (9 << 20),
    ],
    ids=range(15),
)
def test_a_damaged_file_is_set_aside(path, data):
    path.write_bytes(data)
    found = load_peers(path, 100.0)
    assert found.peers == {}
    assert found.problem.code == E_PEERS_FILE
    assert not path.exists()
    assert path.with_suffix(".damaged").exists()
    save_peers(path, {PEER: (KNOWN,)})
    assert load_peers(path, 100.0).peers


@given(st.binary(max_size=300))
def test_any_bytes_are_peers_or_an_error(data):
    with contextlib.suppress(RemoteProtocolError):
        assert isinstance(parse_peers_untrusted(data, 1.0), dict)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    with pytest.raises(ConfigError) as error:
        save_peers(tmp_path / "gone" / "peers.json", {PEER: (KNOWN,)})
    assert error.value.code == E_PEERS_FILE


def test_a_folder_in_its_place_is_reported(path):
    path.mkdir()
    assert load_peers(path, 1.0).problem.code == E_PEERS_FILE


async def test_a_restarted_peer_dials_what_worked_before(path):
    book = PeerBook(OWN)
    file = PeersFile(path, book)
    async with trio.open_nursery() as nursery:
        await nursery.start(file.run)
        book.learn({PEER: [ADDR]}, source="record", wall=5.0)
        book.on_success(PEER, [ADDR], wall=7.0)
        nursery.cancel_scope.cancel()
    later = PeerBook(OWN)
    PeersFile(path, later)
    later.learn({PEER: ["/ip4/192.0.2.66/tcp/6"]}, source="record", wall=9.0)
    assert later.contacts[PEER].addrs[0] == ADDR
    assert later.due(0.0, ()) == [PEER]


async def test_hearsay_is_not_remembered_and_an_unchanged_book_not_written(path):
    book = PeerBook(OWN)
    file = PeersFile(path, book)
    book.learn({PEER: [ADDR]}, source="mdns", wall=5.0)
    await file.save()
    assert not path.exists()
    book.learn({PEER: [ADDR]}, source="record", wall=5.0)
    await file.save()
    first = os.stat(path).st_ino
    await file.save()
    assert os.stat(path).st_ino == first


def test_a_full_book_keeps_members_and_those_that_answered():
    book = PeerBook(PeerId("me"))
    members = [PeerId(f"member-{i}") for i in range(3)]
    book.learn({p: [f"/memory/{p}"] for p in members}, source="record")
    book.on_success(members[0], [f"/memory/{members[0]}"], wall=1.0)
    for i in range(MAX_PEERS + 100):
        book.learn({PeerId(f"stranger-{i}"): ["/memory/x"]}, source="mdns")
    assert len(book.contacts) == MAX_PEERS
    assert set(members) <= set(book.contacts)
    assert book.dropped == 103


def test_hints_do_not_make_us_dial_at_their_rate():
    book = PeerBook(PeerId("me"))
    peer, dials, now = PeerId("victim"), 0, 0.0
    for i in range(600):  # a new address every 0.1 s for a minute
        book.learn({peer: [f"/ip4/192.0.2.1/tcp/{i + 1}"]}, source="mdns", wall=now)
        if book.due(now, ()):
            dials += 1
            book.on_failure(peer, NoRoute("refused"), now)
        now += 0.1
    assert dials <= 18  # every 5 s, and the first few of the backoff


def test_everybody_is_dialled_at_once_after_a_change_of_network():
    book = PeerBook(PeerId("me"))
    peers = [PeerId(f"p{i}") for i in range(4)]
    book.learn({p: [f"/memory/{p}"] for p in peers}, source="record")
    for peer in book.due(0.0, ()):
        book.on_failure(peer, NoRoute("gone"), 0.0)
    assert book.due(0.0, ()) == []
    book.retry_now()
    assert set(book.due(0.0, ())) == set(peers)
