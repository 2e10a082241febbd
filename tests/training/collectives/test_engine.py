"""Groups of engines in threads of one process, over real sockets and shared memory."""

import socket
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch

from fabric.bulk.certificates import (
    JobStatement,
    issue_job_certificate,
    job_credentials,
    make_worker_key,
)
from fabric.core.errors import FabricError, RemoteProtocolError
from fabric.core.signing import Ed25519Signer
from training.worker.backend.measure import measure_links, tournament
from training.worker.backend.process_group import FabricProcessGroup
from training.worker.collectives.connect import BoardConnector, MemoryBoard
from training.worker.collectives.errors import PeerLost, PeerSilent
from training.worker.collectives.handed import HandedConnector
from training.worker.collectives.line import Opened
from training.worker.collectives.links import uniform_links

PATIENCE_SECONDS = 1.0


def credentials():
    key_pem, public_key = make_worker_key()
    now = time.time()
    statement = JobStatement(
        job="job",
        counter=1,
        spki=public_key,
        issued=int(now),
        expires=int(now) + 600,
    )
    signed = issue_job_certificate(Ed25519Signer.generate(), statement, now)
    return job_credentials(key_pem, signed)


def make_connectors(size, *, tls=False, same_host=True):
    board = MemoryBoard()
    return [
        BoardConnector(
            board,
            rank,
            size,
            credentials=credentials() if tls else None,
            same_host=same_host,
            wait_seconds=20,
        )
        for rank in range(size)
    ]


@contextmanager
def groups(size, *, timeout_seconds=30.0, connectors=None, **how):
    names = [f"peer-{rank}" for rank in range(size)]
    made = [
        FabricProcessGroup(
            rank,
            names,
            uniform_links(size),
            connector,
            patience_seconds=PATIENCE_SECONDS,
            timeout=timedelta(seconds=timeout_seconds),
            group_name="test",
        )
        for rank, connector in enumerate(connectors or make_connectors(size, **how))
    ]
    try:
        yield made
    finally:
        together(made, lambda group, _rank: group.shutdown())


def together(made, act):
    """Act as each rank in a thread; return results or what was raised, by rank."""
    results = [None] * len(made)

    def run(rank):
        try:
            results[rank] = act(made[rank], rank)
        except FabricError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(r,)) for r in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def all_reduce(group, rank, numel=300_000):
    value = torch.full((numel,), float(rank + 1))
    group.allreduce([value]).wait()
    return value[-1].item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{}, {"same_host": False}, {"same_host": False, "tls": True}]
)
def test_paths(how):
    with groups(3, **how) as made:
        assert together(made, all_reduce) == [6.0] * 3
        assert together(made, lambda g, r: all_reduce(g, r, 5)) == [6.0] * 3


@pytest.mark.slow
def test_sockets_that_are_handed_over():
    """As a daemon does it: the one who wants to send asks, both get an end."""
    connectors = []

    def asker(rank):
        def ask(peer, channel):
            ours, theirs = socket.socketpair()
            connectors[rank].hand_over(peer, channel, Opened(ours), outgoing=True)
            connectors[peer].hand_over(rank, channel, Opened(theirs), outgoing=False)

        return ask

    connectors += [HandedConnector(asker(rank), 20) for rank in range(3)]
    with groups(3, connectors=connectors) as made:
        assert together(made, all_reduce) == [6.0] * 3


@pytest.mark.slow
def test_who_is_not_on_the_board_is_hung_up_on():
    """A rank whose key is not the one on the board gets nowhere."""
    board = MemoryBoard()
    server = BoardConnector(
        board, 0, 2, credentials=credentials(), same_host=False, wait_seconds=1
    )
    real = BoardConnector(board, 1, 2, credentials=credentials(), same_host=False)
    stranger = BoardConnector(
        MemoryBoard(), 1, 2, credentials=credentials(), same_host=False
    )
    stranger._board = board
    with pytest.raises(FabricError):
        stranger.dial(0, "collective")
    with pytest.raises(FabricError):
        server.accept(1, "collective")
    for connector in (server, real, stranger):
        connector.close()


@pytest.mark.slow
def test_a_rank_that_runs_another_collective_is_found():
    def act(group, rank):
        if rank == 0:
            return all_reduce(group, rank)
        outs = [torch.zeros(10) for _ in range(2)]
        return group.allgather([outs], [torch.zeros(10)]).wait()

    with groups(2) as made:
        results = together(made, act)
    assert any(isinstance(r, RemoteProtocolError) for r in results)
    assert all(isinstance(r, FabricError) for r in results)


@pytest.mark.slow
def test_what_cannot_be_reduced_fails_and_does_not_hang():
    def act(group, rank):
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.BAND
        return group.allreduce([torch.ones(300_000)], options).wait()

    with groups(2) as made:
        results = together(made, act)
    assert all(isinstance(r, FabricError) for r in results)


@pytest.mark.slow
def test_slow_is_not_dead():
    """A rank that comes later than patience is waited for: its process is alive."""

    def act(group, rank):
        all_reduce(group, rank)
        if rank == 1:
            threading.Event().wait(2.5 * PATIENCE_SECONDS)  # it computes
        return all_reduce(group, rank)

    with groups(2) as made:
        assert together(made, act) == [3.0, 3.0]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_at_the_timeout():
    def act(group, rank):
        all_reduce(group, rank, 10)
        return None if rank == 2 else all_reduce(group, rank, 10)

    with groups(3, timeout_seconds=1.5) as made:
        results = together(made, act)
        for rank in (0, 1):
            assert isinstance(results[rank], PeerSilent | PeerLost), results
        assert "peer-2" in {results[0].peer, results[1].peer}


@pytest.mark.slow
def test_after_an_error_the_same_objects_go_on_with_fewer():
    with groups(3) as made:
        together(made, all_reduce)
        made[1].abort()
        results = together(made, all_reduce)
        assert all(isinstance(r, FabricError) for r in results)
        left = [made[0], made[2]]
        fresh = make_connectors(2)
        together(
            left,
            lambda group, rank: group.reconfigure(
                rank, ["peer-0", "peer-2"], uniform_links(2), fresh[rank]
            ),
        )
        assert [g.size() for g in left] == [2, 2]
        assert together(left, all_reduce) == [3.0, 3.0]


@pytest.mark.slow
def test_who_leaves_in_order_fails_who_still_waits_for_it():
    def act(group, rank):
        all_reduce(group, rank)
        if rank == 1:
            group.shutdown()
            return None
        return all_reduce(group, rank)

    with groups(2) as made:
        results = together(made, act)
        assert isinstance(results[0], PeerLost)
        assert results[0].peer == "peer-1"


@pytest.mark.slow
def test_point_to_point_by_tag_beside_collectives():
    def act(group, rank):
        one, two = torch.full((200_000,), 1.0), torch.full((3,), 2.0)
        if rank == 0:
            works = [group.send([one], 1, 7), group.send([two], 1, 8)]
        else:
            one.zero_()
            two.zero_()
            works = [group.recv([two], 0, 8), group.recv([one], 0, 7)]
        total = all_reduce(group, rank)
        for work in works:
            work.wait()
        return one[-1].item(), two[0].item(), total

    with groups(2) as made:
        assert together(made, act) == [(1.0, 2.0, 3.0)] * 2


@pytest.mark.slow
def test_links_are_measured_alike_on_every_rank():
    with groups(3) as made:
        found = together(made, lambda group, _rank: measure_links(group))
        assert found[0] == found[1] == found[2]
        assert min(found[0].rates_of(0)) > 1e6
        for group in made:
            group.use_links(found[0])
        assert together(made, all_reduce) == [6.0] * 3


@pytest.mark.parametrize("size", range(1, 10))
def test_in_a_tournament_everyone_meets_everyone_once(size):
    rounds = tournament(size)
    pairs = [pair for pairs in rounds for pair in pairs]
    assert sorted(pairs) == [(a, b) for a in range(size) for b in range(a + 1, size)]
    for pairs in rounds:
        met = [rank for pair in pairs for rank in pair]
        assert len(met) == len(set(met))
