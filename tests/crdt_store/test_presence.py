"""Who is gone shows in no view for longer than a bound; what it found out stays."""

from __future__ import annotations

import pytest
import trio

from attestation.ports import Verdict
from attestation.states import State, Tier
from crdt_store.link_records import LinkRecord, PublishedLink
from crdt_store.views import MEMBER_TTL_SECONDS, CheckpointHead, MemberRecord
from fabric.app.control_verbs import job_row
from fabric.app.job_store import AssignmentHint, ReplicatedJobStore
from fabric.core.codec import Codec
from fabric.core.ids import JobId
from fabric.jobs.spec import JobSpec
from fabric.jobs.states import JobState, JobStatus
from fabric.jobs.views import view_of_status
from tests.crdt_store.peers import record, until

JOB, RUN = JobId("ab" * 32), "run"


@pytest.fixture
async def mesh(peers, world):
    """Admin, and two workers of whom the second put something into every table."""
    stores = [
        await peers.open(signer)
        for signer in (world.admin, world.workers[0], world.workers[1])
    ]
    me = world.workers[1].peer_id
    for number, store in enumerate(stores):
        await store.members.put(record(f"n{number}"))
    ghost = stores[2]
    await ghost.placements.put("model", b"layers")
    await ghost.links.put(
        JOB, LinkRecord(links={"x": PublishedLink(rtt_microseconds=10)})
    )
    hint = Codec(AssignmentHint, max_bytes=256).encode(AssignmentHint(me, 2))
    await ghost.assignments.put(JOB, 3, hint)
    head = CheckpointHead(root="ab", bytes=1, round=1, writer=me)
    await ghost.heads.put(RUN, 1, head)
    about = world.workers[0].peer_id
    ghost.verdicts.record(Verdict(about, State.TRUSTED, Tier.SOFTWARE, "fine"))
    await until(lambda: len({store.state_hash() for store in stores}) == 1)
    await until(lambda: stores[0].verdicts.for_subject(about))
    return stores


def shown(store, world):
    """In which tables the ghost shows."""
    ghost, other = world.workers[1].peer_id, world.workers[0].peer_id
    found = {
        "members": ghost in store.members.all(),
        "live": ghost in store.members.live(),
        "placements": ghost in store.placements.get("model"),
        "models": "model" in store.placements.models(),
        "links": ghost in store.links.get(JOB),
        "assignments": store.assignments.get(JOB) is not None,
        "coordinator": ReplicatedJobStore(store).coordinator(JOB) is not None,
        "verdicts": ghost in store.verdicts.for_subject(other),
        "heads": store.heads.latest(RUN) is not None,
    }
    return {name for name, shows in found.items() if shows}


EVERYWHERE = {
    "members",
    "live",
    "placements",
    "models",
    "links",
    "assignments",
    "coordinator",
    "verdicts",
    "heads",
}
OFFERED = {"live", "placements", "models", "links", "coordinator"}
"""What the dead do not do, though they may come back."""


def job_of(world):
    """A running job of which the store knows only what the ghost said."""
    ghost = world.workers[1].peer_id
    status = JobStatus(state=JobState.RUNNING, counter=3, coordinator=ghost)
    return view_of_status(JOB, JobSpec(), status)


async def test_the_dead_offer_nothing_within_the_bound_of_liveness(
    autojump_clock, mesh, world, network, peers
):
    ghost = world.workers[1].peer_id
    await trio.sleep(60)
    assert all(shown(store, world) == EVERYWHERE for store in mesh)
    assert job_row(job_of(world), mesh[0].presence.absence).absent == {}
    network.partition({ghost})
    bound = mesh[0].liveness._core._config.ghost_bound_seconds(3)
    with trio.fail_after(bound):
        await until(lambda: all(ghost in s.liveness.dead() for s in mesh[:2]))
    for store in mesh[:2]:
        assert shown(store, world) == EVERYWHERE - OFFERED
        row = job_row(job_of(world), store.presence.absence)
        assert row.absent == {ghost: "dead"}
        assert row.reason == "its coordinator is away (dead)"
    network.heal()
    await until(lambda: all(shown(s, world) == EVERYWHERE for s in mesh))


async def test_who_left_or_was_revoked_shows_no_more(
    autojump_clock, mesh, world, network, peers
):
    ghost = world.workers[1].peer_id
    await mesh[2].members.put(MemberRecord(name="", left=True))
    await until(lambda: all(store.presence.absence(ghost) == "left" for store in mesh))
    for store in mesh[:2]:
        assert shown(store, world) == {"heads"}
        assert job_row(job_of(world), store.presence.absence).absent == {ghost: "left"}
    await mesh[2].members.put(record("back"))
    await until(lambda: all(shown(s, world) == EVERYWHERE for s in mesh))
    await mesh[0].admin.revoke(ghost, "stolen")
    with trio.fail_after(10):
        await until(lambda: all(shown(store, world) == {"heads"} for store in mesh))
    absent = job_row(job_of(world), mesh[1].presence.absence).absent
    assert absent == {ghost: "no member"}
    assert ghost in mesh[1].members.ever(), "for whoever asks why"


async def test_who_was_silent_for_longer_than_a_record_lasts_is_gone(
    autojump_clock, mesh, world, network, peers
):
    ghost = world.workers[1].peer_id
    network.partition({ghost})
    world.now += MEMBER_TTL_SECONDS + 60
    for number, store in enumerate(mesh[:2]):
        await store.members.put(record(f"again{number}"))
    await until(lambda: ghost not in mesh[0].members.ever())
    assert "dead" in mesh[0].presence.absence(ghost)
    assert not shown(mesh[0], world) & {"members", *OFFERED}
