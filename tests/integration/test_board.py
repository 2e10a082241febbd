"""The run board on real daemons: two write at once, a running job takes a setting."""

import threading

import pytest

from fabric.core.errors import ConfigError, FabricError
from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

SOON = 60.0
OUTER = "train.outer.learning_rate"


def test_two_daemons_write_one_board_and_the_job_follows(mesh, form, tiny_spec):
    names = ("p0", "p1", "p2")
    form(*names)
    spec = tiny_spec(rounds=60, inner_steps=10)
    job = mesh.client("p1").submit(spec)  # p0 is the owner, p1 the submitter
    jobs = {name: mesh.client(name).job(job.id) for name in names}
    wait_until(
        lambda: all(
            any(row.job == job.id for row in mesh.client(n).jobs()) for n in names
        ),
        SOON,
        "the job to be known everywhere",
    )
    wait_until(lambda: jobs["p0"].status().round >= 2, 90, "the job to run")

    failures = []

    def write(name):
        try:
            for number in range(5):
                jobs[name].write_board(notes=[f"{name} says {number}"], tags=[name])
        except FabricError as exc:
            failures.append(exc)

    writers = [threading.Thread(target=write, args=(name,)) for name in ("p0", "p1")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert not failures
    jobs["p0"].write_board(set={OUTER: 0.5})
    jobs["p1"].write_board(set={OUTER: 0.3, "train.learning_rate": 1e-3})

    said = sorted(f"{name} says {n}" for name in ("p0", "p1") for n in range(5))

    def one_board():
        views = [jobs[name].board() for name in names]
        return (
            all(sorted(note.text for note in v.notes) == said for v in views)
            and all({tag.text for tag in v.tags} == {"p0", "p1"} for v in views)
            and all(
                {(o.path, o.value, o.name) for o in v.overrides if o.stands}
                == {(OUTER, 0.3, "p1"), ("train.learning_rate", 1e-3, "p1")}
                for v in views
            )
            and all(
                [(o.path, o.value, o.name) for o in v.overrides if not o.stands]
                == [(OUTER, 0.5, "p0")]
                for v in views
            )
        )

    wait_until(one_board, SOON, "one board everywhere, with what was overruled")

    with pytest.raises(FabricError) as refused:  # a worker, neither submitter nor owner
        jobs["p2"].write_board(set={OUTER: 0.9})
    assert refused.value.code == "E_NOT_AUTHORISED"
    with pytest.raises(FabricError) as wrong:
        jobs["p1"].write_board(set={"train.outer.lr": 0.9})
    assert wrong.value.exit_code == ConfigError.exit_code
    assert OUTER in wrong.value.next_step

    result = jobs["p1"].result()
    # another outer rate on one peer would part its parameters from the others
    assert result.facts["peers_equal"] == 3
    steered = [e for e in jobs["p1"].events(follow=False) if e.kind == "steered"]
    assert {(e.facts["path"], e.facts["value"]) for e in steered} >= {
        (OUTER, 0.3),
        ("train.learning_rate", 0.001),
    }
    assert not [e for e in jobs["p1"].events(follow=False) if e.kind == "diverged"]
