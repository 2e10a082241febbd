"""Jobs services of several peers: faults, newcomers, ends."""

from __future__ import annotations

import contextlib

import pytest
import trio

from fabric.core.errors import ConfigError, ResourceExhausted
from fabric.jobs.config import JobsConfig
from fabric.jobs.job_service import INTEGRITY_ERRORS
from fabric.jobs.ports import MemberFacts
from fabric.jobs.runner import LINK_FACT, RunnerFailed
from fabric.jobs.spec import JobSpec, RequireSpec
from tests.jobs.service_mesh import spec


async def test_a_job_runs_to_its_checkpoint(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec())
    await mesh.until(lambda: mesh.views() and mesh.all_are("done"))
    mesh.check_equal(job)
    view = mesh.views()[0]
    assert view.facts["tokens"] == 5 * 4 * 100
    assert view.facts["peers_equal"] == 4
    assert view.facts["validation_loss"] == 1.5
    assert view.facts["loss"] == 2.0
    links = [k for k in view.facts if k.startswith(LINK_FACT)]
    assert len(links) == 16
    events = await mesh.services[2].events(job)
    kinds = [event.kind for event in events]
    assert kinds.count("round") == 5
    assert kinds[-1] == "done"
    assert [e.seq for e in events] == sorted({e.seq for e in events})
    assert await mesh.services[2].events(job, since=events[-1].seq) == []


async def test_a_killed_participant_does_not_stop_the_others(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec())
    await mesh.until(mesh.decided(2))
    mesh.kill(2)
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    assert mesh.ids[2] not in mesh.last_participants()


async def test_a_killed_process_is_replaced_without_the_full_patience(
    autojump_clock, mesh
):
    await mesh.services[0].submit(spec(rounds=30))
    await mesh.until(mesh.decided(2))
    mesh.kill(2)
    killed_at = trio.current_time()
    await mesh.until(lambda: len(mesh.last_participants()) == 3)
    assert trio.current_time() - killed_at < 0.4 * 4.0


class ForgetfulMemory:
    """Hot states of a peer that keeps none and waits for others in vain."""

    def newest(self, job):
        return None

    def checkpoint(self, job, spec, participants):
        return 0

    async def recall(self, job, participants):
        await trio.sleep(1000)

    async def forget(self, job):
        pass


async def test_a_job_that_waits_for_its_state_holds_no_other_up(autojump_clock, mesh):
    await mesh.services[0].submit(spec(rounds=1000))
    await mesh.until(mesh.decided(2))
    mesh.kill(1)
    mesh.hot = ForgetfulMemory()
    await mesh.start(1)
    await trio.sleep(2 * mesh.config.refresh_seconds)  # it has looked around
    other = await mesh.services[0].submit(spec())

    def done():
        return {v.state for v in mesh.services[1].jobs() if v.job == other} == {"done"}

    await mesh.until(done)


async def test_a_broken_connection_alone_kills_nobody(autojump_clock, mesh):
    await mesh.services[0].submit(spec(rounds=12))
    await mesh.until(mesh.decided(2))
    for _ in range(10):
        mesh.world.rpcs[mesh.ids[0]].break_connection(mesh.ids[2])
        await trio.sleep(0.5)
    await mesh.until(lambda: mesh.all_are("done"))
    assert max(v.counter for v in mesh.views().values()) == 1


async def test_a_paused_process_gets_the_full_patience(autojump_clock, mesh):
    """Its connection breaks, but calls to it hang instead of being refused."""
    await mesh.services[0].submit(spec(rounds=30))
    await mesh.until(mesh.decided(2))
    ids = mesh.ids
    mesh.world.groups = [{ids[0], ids[1], ids[3]}, {ids[2]}]
    mesh.world.rpcs[ids[0]].break_connection(ids[2])
    await trio.sleep(3.5)
    assert len(mesh.last_participants()) == 4
    mesh.world.groups = None
    await mesh.until(lambda: mesh.all_are("done"))
    assert max(v.counter for v in mesh.views().values()) == 1


async def test_a_wrong_state_is_counted_and_fetched_again(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=6))
    await mesh.until(mesh.decided(2))
    runner = mesh.world.runners[mesh.ids[3]]
    runner.states[runner.round] = "bit flip"
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    assert mesh.counters[0].snapshot()[f"{INTEGRITY_ERRORS}:jobs"] == 1
    assert mesh.views()[0].counter == 2, "one new generation, to fetch in"
    assert len(mesh.last_participants()) == 4
    kinds = [event.kind for event in await mesh.services[1].events(job)]
    assert kinds.count("diverged") == 1


async def test_a_killed_coordinator_is_succeeded(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec())
    await mesh.until(mesh.decided(2))
    before = await mesh.services[1].events(job)
    mesh.kill(0)
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    after = await mesh.services[1].events(job, since=before[-1].seq)
    assert [e.kind for e in after][-1] == "done"
    assert mesh.views()[1].facts["tokens"] >= 5 * 3 * 100


async def test_a_newcomer_takes_part_from_a_later_round_on(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=8))
    await mesh.until(mesh.decided(2))
    await mesh.start(4)
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    assert mesh.ids[4] in mesh.last_participants()


async def test_halves_pause_and_resume_after_the_heal(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=6))
    await mesh.until(mesh.decided(2))
    ids = mesh.ids
    mesh.world.groups = [{ids[0], ids[1]}, {ids[2], ids[3]}]
    services = [mesh.services[i] for i in range(4)]
    await mesh.until(
        lambda: all((w := s.why(job)) and w.code == "no_quorum" for s in services)
    )
    assert not mesh.all_are("done")
    mesh.world.groups = None
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)


async def test_a_killed_peer_comes_back_and_ends_with_the_rest(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=8))
    await mesh.until(mesh.decided(2))
    mesh.kill(1)
    await trio.sleep(0.5)
    await mesh.start(1)
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)


async def test_a_failed_worker_is_replaced_and_nobody_else_stops(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec(rounds=8))
    await mesh.until(mesh.decided(2))
    await mesh.world.runners[mesh.ids[3]].send.send(
        RunnerFailed("E_WORKER", "segfault")
    )
    await mesh.until(lambda: mesh.all_are("done"))
    mesh.check_equal(job)
    kinds = [e.kind for e in mesh.services[3]._task(job).log.since(0)]
    assert "worker_failed" in kinds


async def test_a_job_that_ended_before_this_daemon_started_is_known_by_its_status(
    autojump_clock, mesh
):
    job = await mesh.services[0].submit(spec())
    await mesh.until(lambda: mesh.views() and mesh.all_are("done"))
    before = mesh.views()[0]
    mesh.kill(3)
    await mesh.start(3)
    service = mesh.services[3]
    (view,) = service.jobs()
    assert (view.state, view.round, view.rounds) == ("done", 5, 5)
    assert view.facts["checkpoint"] == before.facts["checkpoint"]
    assert view.coordinator == mesh.ids[0]
    (event,) = await service.events(job)
    assert (event.kind, event.peer) == ("done", mesh.ids[0])
    assert event.facts["tokens"] == before.facts["tokens"]
    assert event.seq > (await mesh.services[0].events(job))[-1].seq
    assert await service.events(job, since=event.seq) == []
    assert service.why(job) is None
    await service.stop(job)
    assert service.jobs() == [view]


async def test_what_is_kept_of_jobs_that_ended_is_bounded(autojump_clock, mesh):
    for index in range(4):
        mesh.kill(index)
    mesh.config = JobsConfig(max_ended=2)
    await mesh.start(0)
    service = mesh.services[0]
    names = []
    for _ in range(6):
        names.append(await service.submit(spec(rounds=1, min_peers=1)))
        await mesh.until(
            lambda: (
                all(v.state == "done" for v in service.jobs())
                and len(service.jobs()) == len(names)
            )
        )
    assert all(mesh.disks[0].values())
    await trio.sleep(2 * mesh.config.retire_seconds)
    assert list(service._tasks) == names[-2:]
    assert not any(mesh.disks[0].values()), "closed"
    assert {v.state for v in service.jobs()} == {"done"}
    assert len(await service.events(names[0])) == 1
    mesh.world.statuses.clear()  # whoever said so was revoked
    await trio.sleep(2 * mesh.config.refresh_seconds)
    assert list(service._tasks) == names[-2:], "what is closed does not start again"
    mesh.world.specs.clear()
    await trio.sleep(2 * mesh.config.retire_seconds)
    assert mesh.disks[0] == {}


async def test_stop_from_a_member_that_does_not_coordinate(autojump_clock, mesh):
    job = await mesh.services[0].submit(spec())
    await mesh.until(mesh.decided(1))
    await mesh.services[3].stop(job)
    await mesh.until(lambda: mesh.all_are("cancelled"))


async def test_a_full_disk_stops_this_peer_only(autojump_clock, mesh):
    mesh.stores[3].full = True
    job = await mesh.services[0].submit(spec(min_peers=3))
    await mesh.until(
        lambda: all(
            mesh.views().get(i) and mesh.views()[i].state == "done" for i in range(3)
        )
    )
    why = mesh.services[3].why(job)
    assert why is not None
    assert "disk" in why.reason


async def test_a_job_that_waits_says_for_what(autojump_clock, mesh):
    mesh.kill(3)
    mesh.members[mesh.ids[3]] = MemberFacts(
        memory_bytes=1 << 30
    )  # believed to be there
    job = await mesh.services[0].submit(spec())
    await trio.sleep(10)
    why = mesh.services[0].why(job)
    assert why is not None
    assert (why.code, why.reason) == ("waiting_for_peers", "3 of 4 peers are there")


async def test_what_the_mesh_lacks_is_said_at_submit(autojump_clock, mesh):
    with pytest.raises(
        ResourceExhausted, match="needs 9 peers, the mesh has 4"
    ) as caught:
        await mesh.services[0].submit(spec(min_peers=9))
    assert caught.value.exit_code == 6
    greedy = JobSpec(require=RequireSpec(memory_bytes=1 << 40))
    with pytest.raises(ResourceExhausted, match="free memory"):
        await mesh.services[0].submit(greedy)
    with pytest.raises(ConfigError):
        await mesh.services[0].stop("nope")
    with contextlib.suppress(ResourceExhausted):
        await mesh.services[0].submit(JobSpec())
