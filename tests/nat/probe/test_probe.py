"""Whom to probe and when; what others may ask of us; when links are published again."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.entry import MAX_VALUE_BYTES
from crdt_store.link_records import MAX_LINKS, LinkRecord, PublishedLink
from fabric.app.links import as_record
from fabric.core.codec import Codec
from fabric.core.ids import peer_id_of
from fabric.net.ports import LinkMeasurement
from nat.probe.config import ProbeConfig
from nat.probe.core import ProbeAllowance, ProbeBook, choose
from nat.probe.publish import REFRESH_SECONDS, LinkSheet

CONFIG = ProbeConfig()
PEERS = [peer_id_of(bytes([number]) * 32) for number in range(80)]
ME = PEERS[0]


def measured(rtt=0.03, up=1e6, down=2e6, at=0.0, path="direct"):
    return LinkMeasurement(
        rtt_seconds=rtt,
        up_bytes_per_second=up,
        down_bytes_per_second=down,
        measured_at=at,
        path=path,
    )


def book_of(peers, now=0.0, seed=1):
    book = ProbeBook(ME, CONFIG, random.Random(seed))
    book.set_members(peers, now)
    return book


def test_at_most_32_links_are_measured_and_pairs_agree():
    chosen = {peer: set(choose(peer, PEERS, 32)) for peer in PEERS}
    assert all(len(some) == 32 for some in chosen.values())
    assert all(peer not in some for peer, some in chosen.items())
    links = [(one, two) for one, some in chosen.items() for two in some]
    mutual = sum(one in chosen[two] for one, two in links)
    assert mutual > 0.6 * len(links)
    assert choose(ME, PEERS[:10], 32) == choose(ME, PEERS[9::-1], 32)


def test_half_of_the_links_are_to_those_nearby():
    near = PEERS[40:60]
    chosen = choose(ME, PEERS, 32, near)
    assert len(set(chosen)) == 32
    assert 16 <= len(set(chosen) & set(near)) < 32
    assert choose(ME, PEERS, 32, PEERS[:3])[:2] == choose(ME, PEERS[:3], 32)
    few = choose(ME, PEERS[:10], 32, near)
    assert set(few) == set(PEERS[1:10])


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from(["good", "bad", "busy"]), st.floats(0.1, 300.0)),
        min_size=1,
        max_size=60,
    ),
    st.integers(0, 5),
)
def test_every_link_is_measured_again_in_time_whatever_happens(steps, seed):
    book = book_of(PEERS[:6], seed=seed)
    now = 0.0
    for outcome, wait in steps:
        now += wait
        peer = book.due(now)
        if peer is None:
            assert book.next_due() > now
            continue
        if outcome == "good":
            book.measured(peer, measured(at=now), now)
            assert book.is_fresh(peer, now)
        elif outcome == "busy":
            book.note_traffic(peer, 5e5, 1e4)
            book.take_traffic(peer, 0.02, "direct", now)
        else:
            book.failed(peer, now)
        assert book.due(now) != peer
    # liveness: when all succeed from now on, all are measured within one age
    end = now + CONFIG.max_age_seconds
    while (peer := book.due(end)) is not None:
        book.measured(peer, measured(at=end), end)
    assert set(book.links()) == set(PEERS[1:6])


def test_members_that_left_are_forgotten_and_strangers_not_measured():
    book = book_of(PEERS[:3])
    book.measured(PEERS[1], measured(), 0.0)
    book.measured(PEERS[9], measured(), 0.0)
    assert set(book.links()) == {PEERS[1]}
    book.set_members(PEERS[2:4], 1.0)
    assert book.links() == {}
    assert book.link(PEERS[1]) is None


def test_a_failing_link_is_tried_less_and_less():
    book = book_of([PEERS[1]])
    now, waits = 100.0, []
    for _ in range(8):
        assert book.due(now) == PEERS[1]
        book.failed(PEERS[1], now)
        waits.append(book.next_due() - now)
        now = book.next_due()
    assert waits[:3] == [60, 120, 240]
    assert max(waits) <= CONFIG.max_age_seconds


def test_traffic_of_a_busy_link_raises_what_is_known_and_never_lowers_it():
    book = book_of([PEERS[1]])
    assert book.is_busy(2e5, 0)
    assert not book.is_busy(1e4, 1e3)
    book.measured(PEERS[1], measured(up=1e6, down=1e6), 0.0)
    for up in (2e5, 5e6, 3e5):
        book.note_traffic(PEERS[1], up, 2e5)
    book.take_traffic(PEERS[1], 0.02, "direct", 700.0)
    known = book.link(PEERS[1])
    assert (known.up_bytes_per_second, known.down_bytes_per_second) == (5e6, 1e6)
    # another path is another link: what the old one carried says nothing
    book.note_traffic(PEERS[1], 2e5, 2e5)
    book.take_traffic(PEERS[1], 0.2, "relay", 1400.0)
    assert book.link(PEERS[1]).up_bytes_per_second == 2e5


@given(st.lists(st.tuples(st.sampled_from(PEERS), st.floats(0, 30)), max_size=300))
def test_no_order_of_requests_gets_more_than_the_allowance(requests):
    config = ProbeConfig(max_serves_per_minute=10)
    allowance = ProbeAllowance(config)
    now, served = 0.0, []
    for peer, wait in requests:
        now += wait
        told = allowance.take(peer, now)
        if told == 0:
            served.append((peer, now))
        else:
            assert 0 < told <= 60
    for peer, at in served:
        minute = [other for other, t in served if at <= t < at + 59.99]
        assert len(minute) <= 10
        assert minute.count(peer) == 1


def test_the_allowance_remembers_a_bounded_number_of_peers():
    allowance = ProbeAllowance(ProbeConfig(max_serves_per_minute=1))
    for number in range(5000):
        assert allowance.take(f"peer{number}", number * 61.0) == 0
    assert len(allowance._last) == 1024


def test_a_record_is_written_when_a_step_changes_and_not_for_noise():
    sheet = LinkSheet(CONFIG)
    assert sheet.update({}, 0.0) is None
    first = sheet.update({PEERS[1]: measured()}, 1.0)
    assert set(first) == {PEERS[1]}
    rng = random.Random(4)
    for minute in range(120):
        noisy = measured(up=1e6 * rng.uniform(0.97, 1.03), rtt=rng.uniform(0.03, 0.031))
        assert sheet.update({PEERS[1]: noisy}, 61.0 * minute) is None
    changed = {PEERS[1]: measured(up=1.5e6)}
    assert sheet.update(changed, 10_000.0) is None  # not urgent: 3 h are not over
    assert sheet.update(changed, 10_802.0)[PEERS[1]].up_bytes_per_second > 1.4e6


def test_urgent_changes_are_written_within_a_minute():
    for new in (
        {PEERS[1]: measured(up=4e5)},
        {PEERS[1]: measured(path="relay")},
        {PEERS[1]: measured(), PEERS[2]: measured()},
        {},
    ):
        sheet = LinkSheet(CONFIG)
        sheet.update({PEERS[1]: measured()}, 0.0)
        assert sheet.update(new, 59.0) is None
        assert sheet.update(new, 60.0) is not None
        assert sheet.update(new, 60.0 + REFRESH_SECONDS - 1) is None
        assert sheet.update(new, 60.0 + REFRESH_SECONDS) is not None


def test_the_largest_record_fits_a_slot():
    widest = PublishedLink(
        rtt_microseconds=2**31,
        up_bytes_per_second=2**40,
        down_bytes_per_second=2**40,
        path="punched",
    )
    record = LinkRecord(links=dict.fromkeys(PEERS[:MAX_LINKS], widest))
    encoded = Codec(LinkRecord, max_bytes=MAX_VALUE_BYTES).encode(record)
    assert len(encoded) < MAX_VALUE_BYTES
    known = as_record({PEERS[1]: measured(rtt=0.0301)}).links[PEERS[1]]
    assert known.rtt_microseconds == 30_100
    assert known.up_bytes_per_second == pytest.approx(1e6)
