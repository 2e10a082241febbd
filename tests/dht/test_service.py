"""Real bytes from several peers at once, some of them bad, slow, dying or refused."""

import random
import threading

import msgspec
import pytest
import trio
import trio.testing

from dht.messages import BULK_SERVICE, CODEC, METHOD_HAVE, METHOD_MANIFEST, Manifest
from dht.providers import PACE_SECONDS, RETRY_SECONDS, Announcements
from fabric.core.errors import (
    IntegrityError,
    RemoteProtocolError,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.ids import BlobId

MIB = 1 << 20
DATA = random.Random(5).randbytes(8 * MIB + 123)


async def seeds(mesh, count, data=DATA):
    peers = [await mesh.join(f"seed{n}") for n in range(count)]
    for peer in peers:
        root = peer.blobs.add_bytes(data, "content")
    return peers, root


def received(peer):
    return peer.counters.snapshot().get("received_bytes:content", 0)


def corrupt(peer):
    """Make ``peer`` send right lengths and wrong bytes; return an event: sent two."""
    handler, sent, twice = peer.bulk[BULK_SERVICE], [], threading.Event()

    def bad(sock, other):
        class Garbage:
            def sendall(self, data):
                sock.sendall(bytes(data[:4]) + bytes(len(data) - 4))
                sent.append(data)
                if len(sent) == 2:
                    twice.set()

            def __getattr__(self, name):
                return getattr(sock, name)

        handler(Garbage(), other)

    peer.bulk[BULK_SERVICE] = bad
    return twice


def waiting(peer, event):
    """Make ``peer`` serve only once ``event`` is set."""
    handler = peer.bulk[BULK_SERVICE]

    def wait(sock, other):
        event.wait(10)
        handler(sock, other)

    peer.bulk[BULK_SERVICE] = wait


def dying(peer, after):
    """Make ``peer`` close each connection after ``after`` blocks."""
    handler = peer.bulk[BULK_SERVICE]

    def die(sock, other):
        left = [after]

        class Dying:
            def sendall(self, data):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError("killed")
                sock.sendall(data)

            def __getattr__(self, name):
                return getattr(sock, name)

        handler(Dying(), other)

    peer.bulk[BULK_SERVICE] = die


def silent(peer):
    """Make ``peer`` read requests and never answer until the connection closes."""

    def wait(sock, other):
        buffer = bytearray(4096)
        while sock.recv_into(buffer):
            pass

    peer.bulk[BULK_SERVICE] = wait


@pytest.mark.slow
async def test_three_good_one_garbage_one_dying_one_silent(mesh):
    (*good, bad, mortal, slow), root = await seeds(mesh, 6)
    banned = corrupt(bad)
    for peer in good:
        waiting(peer, banned)
    dying(mortal, 1)
    silent(slow)
    config = msgspec.structs.replace(good[0].config, window_blocks=1)
    leech = await mesh.join("leech", config)
    with trio.fail_after(30):
        got = await leech.content.fetch(
            root, [p.own for p in [bad, mortal, slow, *good]]
        )
    assert got == root
    exported = b"".join(leech.blobs.read_block(root, i) for i in range(9))
    assert exported == DATA
    counted = leech.counters.snapshot()
    assert counted["content_bad_blocks_total"] == 2
    assert counted["protocol_errors_total:dht"] == 1
    assert leech.dialled.count(bad.own) == 1, "banned"
    assert counted["received_bytes:content"] >= len(DATA)


async def test_found_through_routing_and_announced_after(mesh):
    (seed,), root = await seeds(mesh, 1, b"small content")
    leech, third = await mesh.join("leech"), await mesh.join("third")
    with trio.fail_after(10):
        assert await seed.content.provide(root) == 2
        assert await leech.content.providers(root) == [seed.own]
        await leech.content.fetch(root)
        await trio.testing.wait_all_tasks_blocked()
        assert leech.own in await third.content.providers(root)
    assert leech.blobs.read_block(root, 0) == b"small content"


async def test_empty_content_needs_no_block(mesh):
    (seed,), root = await seeds(mesh, 1, b"")
    leech = await mesh.join("leech")
    with trio.fail_after(10):
        await leech.content.fetch(root, [seed.own])
    assert leech.blobs.has(root)


async def test_a_peer_outside_the_gate_is_not_asked(mesh):
    (inside, outside), root = await seeds(mesh, 2, b"x" * 10)
    leech = await mesh.join("leech")
    leech.refused.add(outside.own)
    with trio.fail_after(10):
        await leech.content.fetch(root, [outside.own, inside.own])
    assert leech.dialled == [inside.own]
    other = await mesh.join("other")
    other.refused |= {inside.own, outside.own, leech.own}
    with trio.fail_after(10), pytest.raises(Unavailable):
        await other.content.fetch(root, [outside.own])
    assert other.dialled == []


async def test_nobody_has_it(mesh):
    peer, leech = await mesh.join("peer"), await mesh.join("leech")
    root = BlobId("0" * 64)
    with trio.fail_after(10), pytest.raises(Unavailable) as failed:
        await leech.content.fetch(root, [peer.own])
    assert failed.value.code == "E_NO_CONTENT"
    assert "fabric status" in failed.value.next_step
    with pytest.raises(Unavailable):
        await leech.content.provide(root)


async def test_anothers_manifest_is_an_integrity_error_unless_one_is_right(mesh):
    (liar, honest), root = await seeds(mesh, 2, b"content")
    other = liar.blobs.raw_manifest(liar.blobs.add_bytes(b"other"))

    async def lie(peer, request):
        return CODEC.encode(Manifest(other))

    liar.handlers[METHOD_MANIFEST] = lie
    leech = await mesh.join("leech")
    with trio.fail_after(10):
        with pytest.raises(IntegrityError, match="does not match root"):
            await leech.content.fetch(root, [liar.own])
        assert leech.blobs.ls() == []
        await leech.content.fetch(root, [liar.own, honest.own])


@pytest.mark.parametrize("answer", [b"\xc1" * 10, b"\0" * (5 << 20), b""])
async def test_a_malformed_or_oversized_manifest_is_refused(mesh, answer):
    (liar,), root = await seeds(mesh, 1, b"content")

    async def lie(peer, request):
        return answer

    liar.handlers[METHOD_MANIFEST] = lie
    leech = await mesh.join("leech")
    with trio.fail_after(10), pytest.raises(RemoteProtocolError):
        await leech.content.fetch(root, [liar.own])


async def test_all_sources_die_and_what_arrived_is_kept(mesh):
    (mortal, seed), root = await seeds(mesh, 2)
    dying(mortal, 2)
    leech = await mesh.join("leech")
    raw = mortal.handlers[METHOD_HAVE]

    async def gone(peer, request):
        mortal.handlers[METHOD_HAVE] = None
        return await raw(peer, request)

    mortal.handlers[METHOD_HAVE] = gone
    with trio.fail_after(10), pytest.raises(Unavailable, match="2 of 9 blocks"):
        await leech.content.fetch(root, [mortal.own])
    assert not leech.blobs.has(root)
    before = received(leech)
    with trio.fail_after(10):
        await leech.content.fetch(root, [seed.own])
    after = received(leech)
    assert after == len(DATA), "no block was fetched twice"
    assert before in (2 * MIB, MIB + 123)


async def test_a_holder_that_is_away_for_a_while_is_waited_for(mesh):
    (seed,), root = await seeds(mesh, 1)
    serve, calls, away = seed.bulk[BULK_SERVICE], [], trio.Event()
    dying(seed, 2)
    config = msgspec.structs.replace(seed.config, holders_wait_seconds=10)
    leech = await mesh.join("leech", config)
    call = leech.call

    async def unreachable(peer, method, request):
        calls.append(method)
        if calls.count(METHOD_HAVE) > 1:
            if calls.count(METHOD_HAVE) == 4:
                away.set()
            raise Unavailable("the uplink changed")
        return await call(peer, method, request)

    leech.call = unreachable
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leech.content.fetch, root, [seed.own])
            await away.wait()
            told = leech.content.progress(root)
            assert (told.num_held, told.num_blocks, told.num_sources) == (2, 9, 0)
            assert told.waited_seconds > 0
            leech.call, seed.bulk[BULK_SERVICE] = call, serve
    assert leech.blobs.has(root)
    assert received(leech) == len(DATA), "no block was fetched twice"
    assert leech.content.progress(root) is None


async def test_the_manifest_of_a_holder_that_is_away_is_waited_for(mesh):
    (seed,), root = await seeds(mesh, 1, b"content")
    handler, calls = seed.handlers.pop(METHOD_MANIFEST), []
    leech = await mesh.join("leech")
    with trio.fail_after(10), pytest.raises(Unavailable) as failed:
        await leech.content.fetch(root, [seed.own])
    assert failed.value.code == "E_NO_CONTENT"
    config = msgspec.structs.replace(seed.config, holders_wait_seconds=10)
    patient = await mesh.join("patient", config)
    call = patient.call

    async def counted(peer, method, request):
        calls.append(method)
        if len(calls) == 3:
            seed.handlers[METHOD_MANIFEST] = handler
        return await call(peer, method, request)

    patient.call = counted
    with trio.fail_after(10):
        await patient.content.fetch(root, [seed.own])
    assert patient.blobs.has(root)


async def test_cancelled_half_way_leaves_a_resumable_part(mesh):
    (seed,), root = await seeds(mesh, 1)
    handler, sent = seed.bulk[BULK_SERVICE], []
    release = threading.Event()

    def pausing(sock, other):
        class Pausing:
            def sendall(self, data):
                sent.append(len(data))
                if len(sent) == 4:
                    release.wait(10)
                sock.sendall(data)

            def __getattr__(self, name):
                return getattr(sock, name)

        handler(Pausing(), other)

    seed.bulk[BULK_SERVICE] = pausing
    leech = await mesh.join("leech")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leech.content.fetch, root, [seed.own])
            while received(leech) < 2 * MIB:  # noqa: ASYNC110  real threads, no event
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()
        release.set()
        assert not leech.blobs.has(root)
        seed.bulk[BULK_SERVICE] = handler
        await leech.content.fetch(root, [seed.own])
    assert received(leech) <= len(DATA)
    assert leech.blobs.read_block(root, 8) == DATA[8 * MIB :]


async def test_two_fetches_of_one_root_share_one(mesh):
    (seed,), root = await seeds(mesh, 1)
    leech = await mesh.join("leech")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(leech.content.fetch, root, [seed.own])
    assert received(leech) == len(DATA)
    assert leech.dialled == [seed.own]


async def test_a_partial_holder_serves_what_it_has(mesh):
    (seed,), root = await seeds(mesh, 1)
    middle, leech = await mesh.join("middle"), await mesh.join("leech")
    manifest = seed.blobs.manifest(root)
    partial = middle.blobs.open_partial(root, manifest)
    for index in (0, 3, 8):
        partial.write_block(index, seed.blobs.read_block(root, index))
    dying(seed, 6)
    with trio.fail_after(20):
        await leech.content.fetch(root, [middle.own, seed.own])
    assert leech.blobs.has(root)
    middle.blobs.release(partial)


async def test_a_full_store_is_the_callers_error(mesh):
    (seed,), root = await seeds(mesh, 1)
    leech = await mesh.join("leech")
    leech.blobs.room.max_bytes = 1 << 20
    with trio.fail_after(10), pytest.raises(ResourceExhausted):
        await leech.content.fetch(root, [seed.own])
    assert leech.blobs.ls() == []


async def test_complete_content_is_announced_again(mesh, mock_clock):
    async def pass_time(seconds):
        mock_clock.jump(seconds)
        await trio.testing.wait_all_tasks_blocked()

    (seed,), root = await seeds(mesh, 1, b"a")
    assert await seed.content.provide(root) == 0
    records = mesh.records[bytes.fromhex(root)]
    await pass_time(70)
    assert len(records) == 2, "nobody stored the first, so again in a minute"
    await mesh.join("other")
    await pass_time(70)
    assert len(records) == 3
    await pass_time(3000)
    assert len(records) == 3
    await pass_time(1000)
    assert len(records) == 4
    seed.content.withdraw(root)
    await pass_time(9000)
    assert len(records) == 4


def test_announcements_are_paced_and_retried():
    core = Announcements(3600, random.Random(1))
    assert core.next_timeout() is None
    roots = [BlobId(c * 64) for c in "abc"]
    for root in roots:
        core.add(root, 10.0)
    waits = [core.pace(10.0) for _ in roots]
    assert waits == [0, PACE_SECONDS, 2 * PACE_SECONDS]
    assert core.next_root(9.0) is None
    first = core.next_root(10.0)
    assert first == roots[0]
    core.on_announced(first, 0, 10.0)
    assert core.next_root(10.0) == roots[1]
    for root in roots[1:]:
        core.on_announced(root, 20, 10.0)
    again = core.next_timeout()
    assert 0.9 * RETRY_SECONDS <= again - 10 <= 1.1 * RETRY_SECONDS
    core.remove(first)
    assert core.next_timeout() >= 10 + 0.9 * 3600


@pytest.mark.slow
async def test_a_cancelled_read_ends_and_its_thread_closes_the_socket(mesh):
    (slow,), root = await seeds(mesh, 1)
    silent(slow)
    leech = await mesh.join("leech")
    with trio.move_on_after(0.3):
        await leech.content.fetch(root, [slow.own])
    ((thread, _),) = mesh.threads
    with trio.fail_after(5):
        # the far end sees the end of the stream only if ours was shut down
        await trio.to_thread.run_sync(thread.join)
    assert not leech.blobs.has(root)
