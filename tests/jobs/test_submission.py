"""Who submitted a spec, and what is left of a job that is over."""

from __future__ import annotations

import os

import pytest
from msgspec.structs import replace

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import JobId
from fabric.core.signing import DOMAIN_ENTRY
from fabric.core.telemetry import PROTOCOL_ERRORS
from fabric.jobs.retirement_service import remove_scratch
from fabric.jobs.spec import CODEC, job_id
from fabric.jobs.submission import read_spec_untrusted, sign_spec
from tests.jobs.conftest import signer
from tests.jobs.service_mesh import spec

ME, OTHER = signer(0), signer(1)


def published(found):
    return job_id(found), CODEC.encode(found)


def test_a_signed_spec_is_read_back_and_nonces_differ():
    one, two = sign_spec(spec(), ME, "1"), sign_spec(spec(), ME, "2")
    assert read_spec_untrusted(*published(one)) == one
    assert one.submitter == ME.peer_id
    assert job_id(one) != job_id(two)


@pytest.mark.parametrize(
    "forged",
    [
        spec(),
        replace(spec(), submitter=ME.peer_id, nonce="n"),
        replace(sign_spec(spec(), ME, "n"), submitter=OTHER.peer_id),
        replace(sign_spec(spec(), ME, "n"), nonce="m"),
        replace(sign_spec(spec(), ME, "n"), name="another"),
        replace(sign_spec(spec(), ME, "n"), submitter="nobody"),
        replace(sign_spec(spec(), ME, "n"), signature=ME.sign(DOMAIN_ENTRY, b"")),
    ],
    ids=["unsigned", "named", "taken over", "nonce", "name", "no peer", "domain"],
)
def test_nobody_submits_for_another(forged):
    with pytest.raises(RemoteProtocolError):
        read_spec_untrusted(*published(forged))


def test_a_spec_is_that_of_its_job():
    _, raw = published(sign_spec(spec(), ME, "n"))
    with pytest.raises(RemoteProtocolError, match="not the spec"):
        read_spec_untrusted(JobId("ab" * 32), raw)


async def test_a_forged_job_runs_nowhere_and_is_counted_once(autojump_clock, mesh):
    forged = replace(spec(), submitter=mesh.ids[1], nonce="n")
    job, raw = published(forged)
    await mesh.services[0]._store.put_spec(job, raw)
    genuine = await mesh.services[0].submit(spec())
    await mesh.until(lambda: mesh.views() and mesh.all_are("done"))
    assert {view.job for s in mesh.services.values() for view in s.jobs()} == {genuine}
    for service in mesh.services.values():
        assert service._counters.snapshot()[f"{PROTOCOL_ERRORS}:jobs"] == 1


def test_only_the_last_scratch_directories_of_ended_jobs_stay(tmp_path):
    for at, name in enumerate(("old", "live", "newer", "newest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "worker.log").write_text("log")
        os.utime(tmp_path / name, (at, at))
    remove_scratch(tmp_path, {"live"}, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"live", "newer", "newest"}
    remove_scratch(tmp_path / "none", set(), 0)
