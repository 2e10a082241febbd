"""The real command against real daemons: output, exit codes, refusals."""

import pytest

from fabric.app.client import connect
from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

SOON = 60.0
TINY = """
name = "tiny"
[model]
hidden_size = 32
intermediate_size = 64
num_layers = 1
context_tokens = 32
[train]
batch_size = 1
[train.outer]
rounds = 100000
inner_steps = 5
[require]
min_peers = 2
"""


@pytest.fixture(scope="module")
def homes(mesh, fabric):
    """Two peers in one mesh, put together by the commands; returns their homes."""
    mesh.start_all(("a", "b"), ("train.worker_threads=1",))
    a, b = (mesh.directory / name for name in ("a", "b"))
    made = fabric("mesh", "init", "lab", "--home", a, "--json")
    assert made.code == 0, made.err
    assert made.json["name"] == "lab"
    token = fabric("invite", "--uses", "1", "--ttl", "5m", "--home", a, "--json")
    joined = fabric("join", token.json["token"], "--home", b, "--json")
    assert joined.json == {"mesh": made.json["mesh"]}

    def linked():
        return all(
            [row.name for row in connect(home).status().peers if row.connected]
            == [other]
            for home, other in ((a, "b"), (b, "a"))
        )

    wait_until(linked, SOON, "the two to know each other")
    return a, b


@pytest.fixture
def job_file(short_dir):
    path = short_dir / "tiny.toml"
    path.write_text(TINY)
    return path


# -- without a daemon


def test_no_daemon(fabric, short_dir):
    home = ("--home", short_dir / "none")
    for verb in (("status",), ("jobs",), ("why", "x"), ("down",), ("content", "ls")):
        done = fabric(*verb, *home, "--json")
        assert done.code == 3
        assert done.refusal["code"] == "E_NO_DAEMON"
        assert "fabric up" in done.refusal["next_step"]
    done = fabric("status", *home)
    assert done.out == ""  # without --json, refusals are talk
    assert "E_NO_DAEMON" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("jobs", "--bogus"),
        ("run",),
        ("ping", "x", "--count", "many"),
        ("ckpt", "bogus"),
        ("ckpt", "verify"),
        ("ckpt", "verify", "/nonexistent"),
        ("sim", "bogus"),
        ("sim", "up", "-n", "0"),
        ("sim", "status", "--dir", "/nonexistent"),
        ("run", "/nonexistent.toml"),
    ],
    ids=" ".join,
)
def test_usage_errors(fabric, arguments):
    done = fabric(*arguments)
    assert done.code == 2
    assert done.err
    assert "Traceback" not in done.err


def test_dry_run(fabric, job_file):
    done = fabric("run", job_file, "--dry-run", "--set", "train.outer.rounds=3")
    assert done.json["train"]["outer"]["rounds"] == 3
    assert done.json["train"]["batch_size"] == 1

    for change, reason in (
        ("train.outer.round=3", "did you mean train.outer.rounds?"),
        ("train.outer.rounds=many", "'many' is not a number"),
        ("train.outer.rounds=0", "$.train.outer.rounds"),
        ("train.outer.rounds", "is not key=value"),
        ("model.num_heads=5", "is not a multiple of"),
    ):
        done = fabric("run", job_file, "--dry-run", "--set", change)
        assert (done.code, done.out) == (2, ""), change
        assert reason in done.err, change


# -- with daemons


def test_status_and_peers(fabric, homes):
    a, _ = homes
    view = fabric("status", "--home", a, "--json").json
    assert (view["state"], view["role"], view["name"]) == ("member", "owner", "a")
    (row,) = view["peers"]
    assert (row["name"], row["role"], row["connected"]) == ("b", "worker", True)
    assert "b" in fabric("status", "--home", a).out

    pings = fabric("ping", "b", "--count", "2", "--home", a, "--json").rows
    assert [ping["peer"] for ping in pings] == [row["peer"]] * 2
    assert all(0 < ping["rtt_ms"] < 5000 for ping in pings)
    why = fabric("why", "b", "--home", a, "--json").json
    assert any("connected" in line for line in why["lines"])

    nobody = fabric("ping", "nobody", "--home", a, "--json")
    assert (nobody.code, nobody.refusal["code"]) == (3, "E_NO_PEER")


def test_refusals(fabric, homes, short_dir):
    a, b = homes
    again = fabric("mesh", "init", "other", "--home", b, "--json")
    assert (again.code, again.refusal["code"]) == (2, "E_HAS_MESH")
    worker = fabric("invite", "--home", b, "--json")  # a worker may not invite
    assert worker.code == 4, worker
    assert worker.refusal["next_step"]
    for arguments in (("--ttl", "soon"), ("--role", "king"), ("--uses", "0")):
        done = fabric("invite", *arguments, "--home", a, "--json")
        assert done.code == 2, (arguments, done)
        assert done.refusal["reason"]


def test_job_that_asks_for_too_much(fabric, homes, job_file):
    a, _ = homes
    for change, reason in (
        ("require.min_peers=5", "the job needs 5 peers, the mesh has 2"),
        ("require.memory_bytes=9007199254740992", "0 of 2 fit"),
    ):
        done = fabric("run", job_file, "--set", change, "--home", a, "--json")
        assert done.code == 6
        assert done.refusal["code"] == "E_RESOURCES"
        assert reason in done.refusal["reason"]
        assert done.refusal["next_step"]
    assert fabric("jobs", "--home", a, "--json").rows == []  # nothing was published


def test_a_job_from_start_to_stop(fabric, homes, job_file):
    a, b = homes
    job = fabric("run", job_file, "--home", a, "--json").json["job"]
    wait_until(lambda: connect(a).job(job).status().round >= 1, 60, "round 1")

    (row,) = fabric("jobs", "--home", b, "--json").rows
    assert (row["job"], row["state"], len(row["participants"])) == (job, "running", 2)
    assert "tiny" in fabric("jobs", "--home", b).out
    kinds = [e["kind"] for e in fabric("logs", job[:8], "--home", b, "--json").rows]
    assert kinds[0] == "generation"
    assert "round" in kinds
    why = fabric("why", job[:8], "--home", b, "--json").json["lines"]
    assert why[0].startswith("job tiny is running")
    plan = fabric("plan", job_file, "--job", job[:8], "--home", a, "--json").json
    assert plan["ranks"] == 2
    assert any("speed is the job's" in note for note in plan["notes"]), plan["notes"]

    assert fabric("stop", job[:8], "--home", b, "--json").code == 0
    ended = fabric("wait", job, "--home", b, "--json")
    assert ended.code == 1
    assert "cancelled" in ended.refusal["reason"]
    wait_until(
        lambda: connect(a).job(job).status().state == "cancelled", SOON, "the end"
    )
    unknown = fabric("logs", "ffff", "--home", a, "--json")
    assert (unknown.code, unknown.refusal["code"]) == (3, "E_NO_JOB")


def test_content(fabric, homes, short_dir):
    a, b = homes
    source = short_dir / "source"
    source.mkdir()
    payload = bytes(range(256)) * (3 << 12)  # three blocks of 1 MiB
    (source / "big").write_bytes(payload)
    (source / "small").write_text("hello")
    root = fabric("content", "add", source, "--home", a, "--json").json["root"]
    rows = fabric("content", "ls", "--home", a, "--json").rows
    assert [(row["root"], row["pinned"]) for row in rows] == [(root, True)]

    target = short_dir / "target"
    done = fabric("content", "get", root, target, "--home", b, "--json")
    assert done.code == 0, done.err
    assert (target / "big").read_bytes() == payload
    assert (target / "small").read_text() == "hello"

    twice = fabric("content", "get", root, target, "--home", b, "--json")
    assert twice.code == 2, twice
    assert str(target) in twice.refusal["reason"]
    malformed = fabric("content", "get", "abc", short_dir / "x", "--home", b, "--json")
    assert malformed.code == 2
    assert "is not a content root" in malformed.refusal["reason"]
    missing = fabric("content", "add", short_dir / "none", "--home", a, "--json")
    assert missing.code == 2, missing
    assert "none" in missing.refusal["reason"]
    unknown = fabric("content", "get", "0" * 64, short_dir / "x", "--home", b, "--json")
    assert unknown.code == 3, unknown
    assert unknown.refusal["reason"]
    assert not (short_dir / "x").exists()


def test_plan_over_links_that_are_measured_now(fabric, homes, job_file):
    a, _ = homes
    blind = fabric("plan", job_file, "--home", a, "--json")
    assert blind.code == 0, blind.err
    planned = fabric("plan", job_file, "--home", a, "--measure", "--json")
    assert planned.code == 0, planned.err
    report = planned.json
    assert report["ranks"] == 2
    # what the one level is called is for the round trip to say, which is long when busy
    assert len(report["levels"]) == 1, report["cuts"]
    assert report["levels"] != ["unmeasured"], report["cuts"]
    assert report["best"]["fits"]
    assert not any("not asked" in note for note in report["notes"])
    assert report["cuts"][0].startswith("no cut: "), report["cuts"]


def test_leave_and_down(fabric, homes):
    _, b = homes
    assert fabric("leave", "--home", b, "--json").json == {"left": True}
    outside = fabric("jobs", "--home", b, "--json")
    assert (outside.code, outside.refusal["code"]) == (2, "E_NO_MESH")
    assert fabric("down", "--home", b, "--json").json == {"down": True}
    wait_until(lambda: fabric("status", "--home", b).code == 3, SOON, "the end of b")


def test_sim(fabric, short_dir):
    where = ("--dir", short_dir / "sim")
    try:
        up = fabric("sim", "up", "-n", "2", *where, "--json")
        assert up.code == 0, up.err
        one, two = (peer["home"] for peer in up.json["peers"])

        def sees_other():
            return any(row.connected for row in connect(one).status().peers)

        wait_until(sees_other, SOON, "the two to connect")
        assert fabric("sim", "partition", "peer-0", "peer-1", *where).code == 0
        wait_until(lambda: not sees_other(), SOON, "the cut")
        why = fabric("why", "peer-1", "--home", one, "--json").json["lines"]
        assert any("E_PARTITIONED" in line for line in why)
        assert fabric("sim", "heal", *where).code == 0
        wait_until(sees_other, SOON, "the two to connect again")

        assert fabric("sim", "pause", "peer-1", *where).code == 0
        assert fabric("sim", "resume", "peer-1", *where).code == 0
        assert connect(two).status().state == "member"
        assert fabric("sim", "kill", "peer-1", *where).code == 0
        status = fabric("sim", "status", *where, "--json").json
        assert status == {"mesh": up.json["mesh"], "alive": ["peer-0"]}
        unknown = fabric("sim", "kill", "peer-9", *where)
        assert unknown.code == 2
        assert "peer-0, peer-1" in unknown.err
    finally:
        down = fabric("sim", "down", *where)
    assert down.code == 0
    assert fabric("status", "--home", one).code == 3
