"""Worker sockets: by offer between daemons, by socket pair inside one."""

import time
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import memory_stream_pair

from fabric.bulk.certificates import (
    JobStatement,
    issue_job_certificate,
    job_credentials,
    make_worker_key,
)
from fabric.bulk.channel import BulkReceiver, BulkSender
from fabric.bulk.tls import handshake
from fabric.core.errors import (
    IntegrityError,
    LocalProtocolError,
    RemoteRefused,
    Unavailable,
)
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.data_config import DataConfig
from fabric.net.data_plane import open_data_plane
from fabric.net.paths import MAX_WAITING_SOCKETS, WorkerPaths
from fabric.net.paths_api import Purpose
from fabric.net.ports import ALLOWED

ALICE, BOB = Ed25519Signer(b"a" * 32), Ed25519Signer(b"b" * 32)
A, B = ALICE.peer_id, BOB.peer_id
JOB = "j" * 64


def worker(signer, *, job=JOB, age=0, counter=1):
    """Credentials of a worker of ``signer``, as daemon and worker make them."""
    pem, spki = make_worker_key()
    issued = int(time.time()) - age
    statement = JobStatement(job, counter, spki, issued, issued + 600)
    return job_credentials(pem, issue_job_certificate(signer, statement, issued))


class OpenGate:
    def allows(self, peer, protocol):
        return ALLOWED


class FakeHost:
    def __init__(self, hosts, peer_id, nursery):
        self.hosts, self.peer_id, self.nursery = hosts, peer_id, nursery
        self.handler = None
        hosts[peer_id] = self

    def addrs(self):
        return ()

    def share_listener(self, take):
        pass

    def set_handler(self, protocol, handler):
        self.handler = handler

    async def open_stream(self, peer, protocol):
        ours, theirs = memory_stream_pair()
        self.nursery.start_soon(self.hosts[peer].handler, self.peer_id, theirs)
        return ours


@asynccontextmanager
async def two_daemons():
    hosts = {}
    config = DataConfig()
    gate = OpenGate()
    async with trio.open_nursery() as nursery:
        host_a, host_b = FakeHost(hosts, A, nursery), FakeHost(hosts, B, nursery)
        async with (
            open_data_plane(config, ALICE, host_a, gate, Counters()) as plane_a,
            open_data_plane(config, BOB, host_b, gate, Counters()) as plane_b,
        ):
            with trio.fail_after(20):
                yield WorkerPaths(plane_a), WorkerPaths(plane_b)
        nursery.cancel_scope.cancel()


async def refusal(awaitable):
    with pytest.raises((RemoteRefused, Unavailable)) as info:
        await awaitable
    return info.value.code


async def test_two_workers_meet_and_exchange_over_their_own_tls():
    async with two_daemons() as (paths_a, paths_b):
        mine, theirs = worker(ALICE), worker(BOB)
        purpose = Purpose(JOB, 3, "activations")
        expected = paths_b.expect(JOB, theirs.der, frozenset({A}))
        dialled = await paths_a.open(B, purpose, mine.der)
        accepted = await expected.accept()
        assert (dialled.peer, dialled.initiator, dialled.path) == (B, True, "direct")
        assert (accepted.peer, accepted.initiator) == (A, False)
        assert dialled.purpose == accepted.purpose == purpose
        assert dialled.peer_certificate == theirs.der
        assert accepted.peer_certificate == mine.der
        assert paths_a.kind(B) == paths_b.kind(A) == "direct"
        received = []

        def dial():
            tls = handshake(
                dialled.sock,
                mine,
                dialled.peer_certificate,
                server=False,
                timeout_seconds=5,
            )
            sender = BulkSender(tls)
            sender.send(1, b"meta", b"tensor" * 10000)
            sender.close()

        def accept():
            tls = handshake(
                accepted.sock,
                theirs,
                accepted.peer_certificate,
                server=True,
                timeout_seconds=5,
            )
            receiver = BulkReceiver(tls, 1 << 20)
            received.append(receiver.receive())
            receiver.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, dial)
            nursery.start_soon(trio.to_thread.run_sync, accept)
        assert received[0].payload == b"tensor" * 10000
        expected.close()


async def test_workers_of_one_daemon_get_a_socket_pair():
    async with two_daemons() as (paths_a, _):
        purpose = Purpose(JOB, 1)
        assert await refusal(paths_a.open(A, purpose, b"")) == "E_NO_WORKER"
        expected = paths_a.expect(JOB, b"", frozenset({A}))
        ours = await paths_a.open(A, purpose, b"")
        theirs = await expected.accept()
        assert ours.path == theirs.path == "local"
        assert ours.peer_certificate == theirs.peer_certificate == b""
        assert ours.initiator
        assert not theirs.initiator
        ours.sock.sendall(b"x")
        assert theirs.sock.recv(1) == b"x"
        ours.sock.close()
        theirs.sock.close()
        expected.close()


async def test_only_expected_peers_and_generations_get_in():
    async with two_daemons() as (paths_a, paths_b):
        mine = worker(ALICE).der
        assert await refusal(paths_a.open(B, Purpose(JOB, 1), mine)) == "E_NO_WORKER"
        expected = paths_b.expect(JOB, worker(BOB).der, frozenset())
        assert (
            await refusal(paths_a.open(B, Purpose(JOB, 1), mine)) == "E_NOT_PARTICIPANT"
        )
        expected.allow(frozenset({A}), min_counter=5)
        assert (
            await refusal(paths_a.open(B, Purpose(JOB, 4), mine))
            == "E_STALE_GENERATION"
        )
        (await paths_a.open(B, Purpose(JOB, 5), mine)).sock.close()
        (await expected.accept()).sock.close()
        expected.close()
        expected.close()
        assert await refusal(paths_a.open(B, Purpose(JOB, 5), mine)) == "E_NO_WORKER"
        with pytest.raises(Unavailable):
            await expected.accept()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: worker(ALICE, age=700),  # expired
        lambda: worker(ALICE, job="k" * 64),  # another job
        lambda: worker(BOB),  # another peer
    ],
    ids=["expired", "other job", "other peer"],
)
async def test_wrong_job_certificates_are_refused_on_both_sides(bad):
    async with two_daemons() as (paths_a, paths_b):
        expected = paths_b.expect(JOB, worker(BOB).der, frozenset({A}))
        code = await refusal(paths_a.open(B, Purpose(JOB, 1), bad().der))
        assert code == "E_INTEGRITY"
        expected.renew(worker(BOB, age=700).der)
        with pytest.raises(IntegrityError):
            await paths_a.open(B, Purpose(JOB, 1), worker(ALICE).der)
        expected.close()


async def test_renewed_certificate_is_shown():
    async with two_daemons() as (paths_a, paths_b):
        expected = paths_b.expect(JOB, worker(BOB).der, frozenset({A}))
        renewed = worker(BOB, counter=2).der
        expected.renew(renewed)
        dialled = await paths_a.open(B, Purpose(JOB, 2), worker(ALICE).der)
        assert dialled.peer_certificate == renewed
        dialled.sock.close()
        (await expected.accept()).sock.close()
        expected.close()


async def test_sockets_queued_before_an_exclusion_are_closed():
    async with two_daemons() as (paths_a, paths_b):
        expected = paths_b.expect(JOB, worker(BOB).der, frozenset({A, B}))
        dialled = await paths_a.open(B, Purpose(JOB, 1), worker(ALICE).der)
        with trio.fail_after(5):
            while not expected._take.statistics().current_buffer_used:  # noqa: ASYNC110
                await trio.sleep(0.005)
        expected.allow(frozenset({B}), min_counter=2)
        local = await paths_b.open(B, Purpose(JOB, 2), b"")
        accepted = await expected.accept()
        assert accepted.peer == B
        assert await trio.to_thread.run_sync(dialled.sock.recv, 1) == b""
        for sock in (dialled.sock, local.sock, accepted.sock):
            sock.close()
        expected.close()


async def test_a_worker_that_takes_nothing_is_bounded_and_close_cleans_up():
    async with two_daemons() as (paths_a, _):
        expected = paths_a.expect(JOB, b"", frozenset({A}))
        ours = [
            await paths_a.open(A, Purpose(JOB, 1), b"")
            for _ in range(MAX_WAITING_SOCKETS)
        ]
        with pytest.raises(Exception, match="wait for this worker"):
            await paths_a.open(A, Purpose(JOB, 1), b"")
        expected.close()
        assert ours[0].sock.recv(1) == b""
        for dialled in ours:
            dialled.sock.close()


async def test_one_job_is_expected_once():
    async with two_daemons() as (paths_a, _):
        paths_a.expect(JOB, b"", frozenset()).close()
        again = paths_a.expect(JOB, b"", frozenset())
        with pytest.raises(LocalProtocolError):
            paths_a.expect(JOB, b"", frozenset())
        again.close()
