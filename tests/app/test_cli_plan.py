"""The verb plan without a mesh, and how links are dealt out to be measured."""

import json
import re
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from crdt_store.link_records import MAX_LINKS, LinkRecord, PublishedLink
from fabric.app.cli import app
from fabric.app.link_survey import own_links, serve_survey, shares, survey
from fabric.core.errors import ConfigError, NoRoute
from fabric.core.ids import PeerId
from fabric.net.ports import LinkMeasurement

EXAMPLES = Path(__file__).parents[2] / "examples"
LINKS = ("--links", str(EXAMPLES / "links-two-sites.toml"))
JOB = str(EXAMPLES / "train.toml")


def plan(capsys, *arguments):
    code = 0
    try:
        app(["plan", JOB, *LINKS, *arguments])
    except SystemExit as ended:
        code = ended.code or 0
    return code, capsys.readouterr().out


def test_a_plan_is_a_table_with_reasons(capsys):
    code, out = plan(capsys)
    assert code == 0
    assert "1,049,984 parameters on 4 ranks" in out
    assert "ann, bob stay together" in out
    assert "W|G|O" in out
    assert "* the fastest that fits" in out
    assert "as the job says" in out
    assert "loss of a site" in out
    assert re.search(r"^ann\+1: .* in and .* out a step at internet$", out, re.M)


def test_a_plan_in_json_has_exact_bytes_by_link(capsys):
    code, out = plan(capsys, "--json", "--mode", "exact", "--allow", "none")
    report = json.loads(out)
    assert code == 0
    best = report["best"]
    assert best["chosen"]
    assert best["memory_bytes"] == sum(best["memory"].values())
    assert {row["weights"] for row in report["rows"]} == {"fp32"}
    sites = [row for row in report["links"] if row["level"] == "internet"]
    assert {row["place"] for row in sites} == {"ann+1", "cat+1"}
    names = [row["name"] for row in report["compared"]]
    assert names == ["ZeRO-3, flat", "2-level", "3-level", "as the job says"]
    # fp32 over two sites: a reduce-scatter and a gather of half the model each way
    two_level = report["compared"][1]
    assert two_level["level_bytes"][1] == 2 * 4 * report["parameters"]


def test_the_job_s_round_is_the_closed_form(capsys):
    """Today each participant sends its whole pseudo-gradient to each other one."""
    _, out = plan(capsys, "--json", "--mode", "outer")
    report = json.loads(out)
    row = report["compared"][-1]
    payload = report["parameters"] * (1 + 4 / 256)
    assert (row["inner_steps"], row["outer"]) == (10, "int8")
    assert sum(row["level_bytes"]) == pytest.approx(4 * 3 * payload / 10, rel=1e-5)


def test_what_does_not_fit_ends_with_6_and_says_what_is_large(capsys):
    code, out = plan(capsys, "--memory", "4MiB", "--rows", "2")
    assert code == 6
    assert "nothing fits the memory" in out
    assert "has 4 MiB; " in out


def test_a_plan_for_a_checkpoint_reads_its_shapes(tmp_path, capsys):
    from safetensors.numpy import save_file

    np = pytest.importorskip("numpy")
    tensors = {f"model.layers.{n}.w": np.zeros((8, 4), np.float32) for n in range(3)}
    save_file(
        {**tensors, "emb": np.zeros((16, 4), np.float32)}, tmp_path / "m.safetensors"
    )
    (tmp_path / "m.safetensors").rename(tmp_path / "model.safetensors")
    _, out = plan(capsys, "--json", "--model", str(tmp_path))
    assert json.loads(out)["parameters"] == 3 * 32 + 64


def test_what_cannot_be_planned_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no states to shard"):
        app(
            [
                "plan",
                JOB,
                *LINKS,
                "--set",
                "kind=serve",
                "--set",
                f"serve.checkpoint={'0' * 64}",
            ]
        )
    with pytest.raises(ConfigError, match="not on this machine"):
        app(["plan", JOB, *LINKS, "--set", f"model.source=blob:{'0' * 64}"])
    with pytest.raises(ConfigError):
        app(["plan", JOB, *LINKS, "--model", str(tmp_path)])


# -- the survey


@settings(max_examples=25)
@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_each_unknown_pair_is_dealt_once_and_evenly(count, rng):
    members = [PeerId(f"p{n:02}") for n in range(count)]
    link = PublishedLink(rtt_microseconds=1)
    known = {
        peer: LinkRecord(
            links={o: link for o in members if o != peer and rng.random() < 0.2}
        )
        for peer in members[: count // 2]
    }
    dealt = shares(members, known)
    pairs = [frozenset((one, other)) for one, row in dealt.items() for other in row]
    measured = {frozenset((p, o)) for p, record in known.items() for o in record.links}
    everything = count * (count - 1) // 2
    assert len(set(pairs)) == len(pairs) == everything - len(measured)
    assert not measured & set(pairs)
    assert max(map(len, dealt.values()), default=0) <= MAX_LINKS


class Prober:
    """Measures links of a small world; of who is gone nothing."""

    def __init__(self, me, gone=()):
        self.me, self.gone, self.asked = me, gone, []

    async def measure(self, peer):
        self.asked.append(peer)
        await trio.lowlevel.checkpoint()
        if peer in self.gone:
            raise NoRoute(f"no way to {peer}")
        return LinkMeasurement(
            rtt_seconds=0.01, up_bytes_per_second=1e6, down_bytes_per_second=2e6
        )


class Exchange:
    """RPC between objects of one process, each under its own name."""

    def __init__(self, me, world):
        self.me, self.world, self.methods = me, world, {}
        world[me] = self

    def register_async(self, method, handler):
        self.methods[method] = handler

    async def call(self, peer, method, request):
        if peer not in self.world:
            raise NoRoute(f"no way to {peer}")
        return await self.world[peer].methods[method](self.me, request)


async def test_members_measure_what_nobody_knows_and_who_is_gone_is_named():
    names = [PeerId(name) for name in "abcd"]
    world, probers = {}, {}
    for name in names[:3]:
        probers[name] = Prober(name, gone=("d",))
        serve_survey(Exchange(name, world), probers[name], lambda: frozenset(names))
    a = names[0]

    async def own(others):
        return await own_links(probers[a], others)

    known = {names[1]: LinkRecord(links={a: PublishedLink(rtt_microseconds=5)})}
    records, silent = await survey(world[a], a, own, names, known)
    found = {frozenset((p, o)) for p, record in records.items() for o in record.links}
    assert found == {frozenset(pair) for pair in ("ab", "ac", "bc")}
    assert records[names[1]].links[a].rtt_microseconds == 5  # not measured again
    assert [line[0] for line in silent] in ([], ["d"])
    assert sum(len(prober.asked) for prober in probers.values()) <= 5


async def test_who_is_no_member_is_not_probed():
    world = {}
    prober = Prober("a")
    serve_survey(Exchange("a", world), prober, lambda: frozenset("ab"))
    caller = Exchange("b", world)

    async def own(others):
        return LinkRecord()

    await survey(caller, PeerId("b"), own, [PeerId(n) for n in ("a", "b", "z")], {})
    assert set(prober.asked) <= {"b"}
