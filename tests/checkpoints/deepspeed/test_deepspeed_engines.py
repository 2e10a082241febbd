"""Checkpoints of real engines: what we read is what DeepSpeed says, bit by bit."""

import itertools
import os
import shutil

import pytest
import torch

from checkpoints.conversion import convert
from checkpoints.conversion_plan import ConvertOptions
from checkpoints.formats import deepspeed_universal, deepspeed_zero
from checkpoints.formats.deepspeed_groups import EXPERTS
from fabric.core.errors import ConfigError, IntegrityError

pytestmark = [pytest.mark.slow, pytest.mark.scenario]

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
SOAK = FACTOR > 1
ZERO = ["z1", "z2", "z3", "b1", "b3", "w1", "w3"]
ZERO += ["b2", "elastic", "aligned", "w2"] if SOAK else []
EXPERT_CASES = ["m1", "m2", "n2", "block"] if SOAK else ["m1"]
PLAIN = ["z0", "m0", "b0"] if SOAK else ["z0", "m0"]
CONVERTED = ["z1", "z2", "z3", "b3", "w1", "w3"]
BF16 = {"config": {"bf16": {"enabled": True}}}


def test_each_format_knows_its_own(saved):
    for name in [*ZERO, *EXPERT_CASES, *PLAIN]:
        assert deepspeed_zero.sniff(saved / name)
        assert deepspeed_zero.sniff(saved / name / "t1")
        assert not deepspeed_universal.sniff(saved / name / "t1")
    assert deepspeed_universal.sniff(saved / "z1" / "uni")
    assert not deepspeed_zero.sniff(saved / "z1" / "uni")


@pytest.mark.parametrize("name", [*ZERO, "round", *EXPERT_CASES, *PLAIN])
def test_the_module_is_what_the_engine_computes_with(saved, engines, name):
    with deepspeed_zero.open_source(saved / name) as source:
        for rank, said in engines.answers(saved / name).items():
            for key, value in said["module"].items():
                ours = engines.tensor(
                    source, "model/" + engines.named(key, rank, name == "block")
                )
                # of bf16 in stage 3 the files have the fp32 weights alone
                assert ours.dtype == value.dtype or name == "b3"
                assert torch.equal(ours.to(value.dtype), value), key


@pytest.mark.parametrize("name", [*ZERO, *EXPERT_CASES])
def test_weights_and_moments_are_what_safe_get_full_says(saved, engines, name):
    with deepspeed_zero.open_source(saved / name) as source:
        known = set(source.names())
        for rank, said in engines.answers(saved / name).items():
            assert said["full"]
            for key, value in said["full"].items():
                slot, _, parameter = key.partition("/")
                parameter = engines.named(parameter, rank, name == "block")
                ours = f"optimizer/{slot}/{parameter}"
                if slot == "fp32" and ours not in known:
                    ours = f"model/{parameter}"
                assert torch.equal(engines.tensor(source, ours), value), ours
        steps = [each for each in known if each.startswith("optimizer/step/")]
        assert len(steps) == len([each for each in known if "/exp_avg/" in each])
        assert all(engines.tensor(source, step) == 3 for step in steps)


def test_an_expert_has_its_own_moments(saved, engines):
    """DeepSpeed#8147: the first rank's were taken for all, without a word."""
    with deepspeed_zero.open_source(saved / "m1") as source:
        for slot in ("exp_avg", "exp_avg_sq"):
            prefix = f"optimizer/{slot}/moe{EXPERTS}"
            found = [engines.tensor(source, f"{prefix}{e}.weight") for e in range(4)]
            for one, other in itertools.combinations(found, 2):
                assert not torch.equal(one, other)


@pytest.mark.parametrize("name", CONVERTED)
def test_as_zero_to_fp32(saved, engines, name):
    theirs = torch.load(saved / name / "zero_to_fp32.pt", weights_only=True)
    with deepspeed_zero.open_source(saved / name) as source:
        for key, value in theirs.items():
            ours = engines.tensor(source, f"model/{key}")
            assert torch.equal(ours.to(value.dtype), value), key
        assert {f"model/{key}" for key in theirs} <= set(source.names())


@pytest.mark.parametrize("name", CONVERTED)
def test_as_ds_to_universal(saved, engines, name):
    with (
        deepspeed_zero.open_source(saved / name) as source,
        deepspeed_universal.open_source(saved / name / "uni") as universal,
    ):
        assert engines.differences(source, universal) == []
        assert universal.state == source.state
    shutil.copytree(saved / name / "uni", saved / f"{name}-root" / "uni")
    (saved / f"{name}-root" / "latest_universal").write_text("uni\n")
    with deepspeed_universal.open_source(saved / f"{name}-root") as again:
        assert again.names() == universal.names()


def test_round_robin_trusts_the_shapes_and_not_the_mappings(saved, engines):
    """The engine's slice mappings, and its safe_get_full, are wrong there."""
    with deepspeed_zero.open_source(saved / "round") as source:
        said = engines.answers(saved / "round")[0]
        theirs = said["full"]["fp32/mix.weight"]
        assert not torch.equal(theirs, said["module"]["mix.weight"])
        ours = engines.tensor(source, "model/mix.weight")
        assert torch.equal(ours, said["module"]["mix.weight"])
    with pytest.raises(IntegrityError, match="mixed its tensors up"):
        deepspeed_universal.open_source(saved / "round" / "uni")


def test_everything_beside_is_carried_or_named(saved):
    with deepspeed_zero.open_source(saved / "z2") as source:
        state = source.state
        assert source.aliases == {"model/head.weight": "model/embed.weight"}
        assert state["client"] == {"note": "\u00e9", "position": [0, 12]}
        assert "client/seen" in source.names()
        assert state["deepspeed"]["global_steps"] == 3
        assert state["lr_scheduler"]["last_epoch"] == 3
        groups = state["optimizer"]["param_groups"]
        assert [each["weight_decay"] for each in groups] == [0.1, 0.0]
        assert groups[1]["params"] == ["norm.weight", "norm.bias"]
        assert [each.name for each in source.ignored] == ["module"]
    with deepspeed_zero.open_source(saved / "z0") as source:
        assert "optimizer.state" in [each.name for each in source.ignored]
        assert "optimizer/exp_avg/0" in source.names()
    with deepspeed_zero.open_source(saved / "m0") as source:
        assert not any(name.startswith("optimizer/") for name in source.names())
        assert "optimizer" in [each.name for each in source.ignored]


@pytest.mark.parametrize("name", [*ZERO, "round"])
def test_universal_round_trip(saved, engines, tmp_path, name):
    with deepspeed_zero.open_source(saved / name) as source:
        if name == "elastic":
            with pytest.raises(ConfigError, match="param_groups"):
                engines.write_universal(engines.bundle_of(source), tmp_path)
            return
        engines.write_universal(engines.bundle_of(source), tmp_path)
        with deepspeed_universal.open_source(tmp_path) as back:
            assert engines.differences(source, back) == []
            assert back.state == source.state


RESUMED = [
    ("z1", 3, 4, {}),
    ("b3", 3, 4, BF16),
    ("w1", 2, 2, {}),
    ("w3", 1, 2, {}),
]
GRID = [
    ("b1", 1, 4, BF16),
    ("b2", 2, 4, BF16),
    *((name, stage, 2, {}) for name in ("w1", "w2", "w3") for stage in (1, 2, 3)),
    *((name, stage, 3, {}) for name in ("z1", "z2", "w3") for stage in (1, 2, 3)),
    *((name, stage, 4, {}) for name in ("z1", "z2", "z3") for stage in (1, 2, 3)),
    *((name, stage, 1, {}) for name in ("z1", "w2", "z3") for stage in (1, 2, 3)),
]


def test_engines_resume_from_what_we_write(saved, engines, tmp_path):
    """Any stage and world to any other; by the canonical format, and ds_to_universal.

    DeepSpeed loads its own format with as many ranks as wrote it, and no others.
    """
    cases = [*RESUMED, *(GRID if SOAK else [])]
    for name in {case[0] for case in cases}:
        canonical = tmp_path / "canonical" / name
        convert(saved / name, canonical, ConvertOptions(to="canonical"))
        convert(canonical, tmp_path / name, ConvertOptions(to="deepspeed-universal"))
    plan = []
    for world in sorted({case[2] for case in cases}):
        loads = [
            {
                "do": "load",
                "directory": str(tmp_path / name),
                "stage": stage,
                "answers": str(tmp_path / f"{name}.{stage}.{world}.pt"),
                **more,
            }
            for name, stage, ranks, more in cases
            if ranks == world
        ]
        plan.append({"world": world, "cases": loads})
    engines.run(tmp_path, plan)
    for name, stage, world, _ in cases:
        then = engines.answers(saved / name)[0]
        now = torch.load(tmp_path / f"{name}.{stage}.{world}.pt", weights_only=True)
        assert then["full"].keys() == now["full"].keys()
        for key, value in then["full"].items():
            assert torch.equal(now["full"][key], value), (name, stage, world, key)
        for key, value in then["module"].items():
            assert torch.equal(now["module"][key], value), (name, stage, world, key)
        assert (now["steps"], now["note"]) == (3, "\u00e9")
        assert any(
            not torch.equal(now["after"][key], now["full"][key]) for key in now["full"]
        )
