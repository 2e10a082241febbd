"""Real worker processes; the test is their daemon and coordinator (see conftest)."""

import pytest

from training.messages import (
    Broken,
    Finished,
    LinkMoved,
    Numbers,
    SaveCheckpoint,
    Saved,
)

pytestmark = pytest.mark.slow


def digests(workers):
    facts = [w.of(Finished)[0].facts for w in workers]
    return {(f["state_digest"], f["parameter_digest"]) for f in facts}


def sent(worker, peer):
    return max(e.sent_bytes for e in worker.of(LinkMoved) if e.peer == peer.peer)


def contribution_bytes(spec):
    """Count the parameters of the Llama by hand, then the closed form."""
    m = spec.model
    head = m.hidden_size // m.num_heads
    attention = 2 * m.hidden_size**2 + 2 * m.hidden_size * m.num_kv_heads * head
    layer = attention + 3 * m.hidden_size * m.intermediate_size + 2 * m.hidden_size
    numel = 2 * 256 * m.hidden_size + m.num_layers * layer + m.hidden_size
    return numel + 4 * -(-numel // spec.train.outer.block)


async def test_three_workers_end_with_equal_states_and_save(cluster, spec, tmp_path):
    job = spec(wide=True)
    workers = await cluster.start(3, job)
    await cluster.apply(workers)
    await cluster.until(lambda: all(w.of(Finished) for w in workers))
    assert len(digests(workers)) == 1
    losses = [w.of(Finished)[0].facts["validation_loss"] for w in workers]
    assert len(set(losses)) == 1
    start = next(w.losses[0] for w in workers if 0 in w.losses)
    assert losses[0] < start

    saver = workers[0]
    directory = cluster.root / saver.peer[-8:] / "checkpoints"
    await cluster.tell(saver, SaveCheckpoint(str(directory), 3))
    await cluster.until(lambda: saver.of(Saved))
    saved = saver.of(Saved)[0]
    assert saved.round == 3
    assert (directory / "step-3" / "manifest.json").is_file()

    # the daemon hears the last byte counts when the worker stops
    await cluster.stop()
    await cluster.until(lambda: not any(w.alive for w in workers))
    expected = job.train.outer.rounds * contribution_bytes(job)
    for a in workers:
        for b in workers:
            if a is not b:
                assert expected <= sent(a, b) <= 1.05 * expected


async def test_a_worker_killed_in_the_middle_of_its_contribution(
    cluster, spec, relay, kill
):
    workers = await cluster.start(3, spec(wide=True))
    a, b, victim = workers
    half = relay(contribution_bytes(cluster.spec) // 2, lambda: kill(victim))
    await cluster.apply(workers, connect=False)
    for x, y in ((a, b), (b, a), (a, victim), (b, victim), (victim, b)):
        await cluster.connect(x, y)
    await cluster.connect_through(victim, a, half)
    await cluster.until(lambda: not victim.alive)
    await cluster.until(lambda: a.of(Broken) and b.of(Broken))
    # the report that names the victim follows the event, in a message of its own
    await cluster.until(
        lambda: 0 in a.reports and a.reports[0].broken == (victim.peer,)
    )
    await cluster.apply([a, b], coordinator=b.peer)
    await cluster.until(lambda: all(w.of(Finished) for w in (a, b)))
    assert len(digests([a, b])) == 1


@pytest.mark.parametrize("fault", ["killed", "corrupt"])
async def test_a_newcomer_gets_the_state_although_a_source_fails(
    cluster, spec, relay, kill, fault
):
    workers = await cluster.start(3, spec(wide=True))
    failing, good, newcomer = workers
    cluster.hold_back = lambda round_number: round_number > 0
    await cluster.apply([failing, good])
    await cluster.until(lambda: 1 in failing.held and 1 in good.held)
    bad = relay(
        2_500_000,
        (lambda: kill(failing)) if fault == "killed" else (lambda: None),
        flip=fault == "corrupt",
    )
    digest = good.held[1].state_digest
    await cluster.apply(
        workers,
        connect=False,
        base_round=1,
        state_digest=digest,
        sources=(failing.peer, good.peer),
    )
    await cluster.connect(newcomer, failing, tls=False)
    await cluster.connect_through(failing, newcomer, bad)
    await cluster.until(lambda: newcomer.of(LinkMoved))
    await cluster.connect(newcomer, good)
    await cluster.connect(good, newcomer)
    await cluster.until(lambda: 1 in newcomer.held)
    assert newcomer.held[1].state_digest == digest
    facts = next(e.facts for e in newcomer.of(Numbers) if "state_sources" in e.facts)
    assert facts["state_sources"] == 2
    assert 0 < facts[f"state_bytes:{failing.peer}"] < 2_500_000
    if fault == "corrupt":
        codes = {e.code for e in newcomer.of(Broken) if e.peer == failing.peer}
        assert "E_INTEGRITY" in codes
    cluster.hold_back = lambda round_number: False
    await cluster.apply([good, newcomer], connect=False, sources=(good.peer,))
    await cluster.until(lambda: all(w.of(Finished) for w in (good, newcomer)))
    assert len(digests([good, newcomer])) == 1
