import contextlib
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.digest import BLOCK_BYTES, block_digests, digest
from fabric.core.errors import IntegrityError
from fabric.core.ids import PeerId
from training.messages import StateListRequest
from training.worker.fetch import WINDOW_BLOCKS, StateFetch

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
DATA = b"".join(
    hashlib.sha256(bytes([n])).digest() * (BLOCK_BYTES // 32) for n in range(4)
) + (b"tail")
LIST = b"".join(block_digests(DATA))
NAME = digest(LIST).hex()


def block(index):
    return DATA[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]


def answer(fetch, peer, request):
    if isinstance(request, StateListRequest):
        fetch.list_received(peer, LIST)
    else:
        fetch.block_received(peer, request.index, block(request.index))


def new_fetch(sources=(A, B, C)):
    fetch = StateFetch(NAME, len(DATA), sources, patience_seconds=1.0)
    for peer in sources:
        fetch.source_ready(peer)
    return fetch


def finish(fetch, now, good):
    """Answer everything that is asked of ``good`` until nothing is asked any more."""
    for _ in range(50):
        for peer, request in list(fetch.requests(now)):
            if peer in good:
                answer(fetch, peer, request)
        now += 2.0


def test_blocks_spread_over_the_sources_within_the_window():
    fetch = new_fetch()
    [(peer, request)] = list(fetch.requests(0.0))
    answer(fetch, peer, request)
    asked = list(fetch.requests(0.0))
    assert sorted(request.index for _, request in asked) == [0, 1, 2, 3, 4]
    assert {peer for peer, _ in asked} == {A, B, C}
    assert max(sum(p == peer for p, _ in asked) for peer in (A, B, C)) <= WINDOW_BLOCKS
    for peer, request in asked:
        answer(fetch, peer, request)
    assert fetch.done
    assert bytes(fetch.data) == DATA


def test_a_lying_source_is_never_asked_again():
    fetch = new_fetch((A, B))
    [(first, _)] = list(fetch.requests(0.0))
    with pytest.raises(IntegrityError):
        fetch.list_received(first, LIST[:-1] + b"x")
    [(second, request)] = list(fetch.requests(0.0))
    assert second != first
    answer(fetch, second, request)
    finish(fetch, 0.0, {second})
    assert fetch.done
    assert set(fetch.received_from) == {second}


def test_no_source_left_is_hopeless():
    fetch = new_fetch((A,))
    list(fetch.requests(0.0))
    fetch.list_received(A, b"")
    assert fetch.hopeless
    assert not list(fetch.requests(9.0))


@settings(max_examples=30)
@given(st.data())
def test_any_faults_of_all_but_one_source_end_in_the_right_bytes(data):
    """Sources are lost, silent, lie or come back; one always answers."""
    fetch = new_fetch()
    now = 0.0
    for _ in range(data.draw(st.integers(0, 12))):
        asked = list(fetch.requests(now))
        for peer, request in asked:
            fault = data.draw(st.sampled_from(["none", "silent", "lost", "lie"]))
            if peer == C or fault == "none":
                answer(fetch, peer, request)
            elif fault == "lost":
                fetch.source_lost(peer)
            elif fault == "lie":
                # an answer that comes after its deadline is ignored, not judged
                with contextlib.suppress(IntegrityError):
                    if isinstance(request, StateListRequest):
                        fetch.list_received(peer, LIST[32:])
                    else:
                        fetch.block_received(peer, request.index, b"wrong")
        now += data.draw(st.sampled_from([0.1, 2.0]))
        if data.draw(st.booleans()):
            fetch.source_ready(A)
    finish(fetch, now + 10.0, {C})
    assert fetch.done
    assert bytes(fetch.data) == DATA


def test_an_answer_nobody_asked_for_is_ignored():
    fetch = new_fetch((A, B))
    fetch.block_received(A, 0, b"junk")
    fetch.list_received(PeerId("stranger"), b"junk")
    finish(fetch, 0.0, {A, B})
    assert fetch.done
    assert bytes(fetch.data) == DATA


def listed():
    fetch = StateFetch(NAME, len(DATA), [A, B], patience_seconds=5.0)
    fetch.source_ready(A)
    assert [peer for peer, _ in fetch.requests(0.0)] == [A]
    fetch.list_received(A, LIST)
    assert list(fetch.requests(0.1)) == []
    return fetch


def test_a_lone_source_waits_a_little_for_company():
    fetch = listed()
    assert 0.1 < fetch.next_deadline() <= 1.2
    fetch.source_ready(B)
    assert {peer for peer, _ in fetch.requests(0.2)} == {A, B}


def test_a_lone_source_is_enough_after_a_while():
    fetch = listed()
    assert {peer for peer, _ in fetch.requests(fetch.next_deadline())} == {A}
