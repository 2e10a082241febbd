"""Universal checkpoints that lack something, lie, or cannot be written."""

import copy
import os
import shutil

import pytest

from checkpoints.formats import deepspeed_universal, deepspeed_zero
from checkpoints.formats.deepspeed_groups import EXPERTS
from checkpoints.formats.sink import Bundle, SinkOptions
from fabric.core.errors import ConfigError, FabricError, IntegrityError

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
GROUPS = [{"a.weight": (3, 5), "a.bias": (5,)}, {"b.weight": (7,)}]
MODEL = "mp_rank_00_model_states.pt"


@pytest.fixture
def universal(tmp_path, forge, engines):
    """A universal checkpoint, and its tag."""
    tag = forge(GROUPS, 1, 2).write(tmp_path / "zero")
    with deepspeed_zero.open_source(tag) as source:
        engines.write_universal(engines.bundle_of(source), tmp_path / "universal")
    return tmp_path / "universal" / "global_step5_universal"


@pytest.mark.parametrize(
    ("gone", "code"),
    [
        ("zero/a.bias/exp_avg.pt", "E_GAP"),
        ("zero/a.bias/step.pt", "E_GAP"),
        ("zero/a.bias/fp32.pt", "E_MISSING_FILE"),
        ("zero/a.bias", "E_MISSING_FILE"),
        ("mp_rank_00_model_states.pt", ""),
        ("zero/optimizer_state.pt", "E_FORMAT"),
    ],
)
def test_universal_with_something_gone(universal, gone, code):
    """DeepSpeed would go on with the moments that its optimizer happens to have."""
    path = universal / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not code:  # there is the same for engines of stage 3
        with deepspeed_universal.open_source(universal) as source:
            assert "model/a.bias" in source.names()
        return
    with pytest.raises(FabricError) as caught:
        deepspeed_universal.open_source(universal)
    assert caught.value.code == code


def test_universal_files_of_others(universal):
    zero = universal / "zero"
    shutil.copy(zero / "b.weight" / "exp_avg.pt", zero / "a.bias" / "exp_avg.pt")
    with pytest.raises(IntegrityError) as caught:
        deepspeed_universal.open_source(universal)
    assert caught.value.code == "E_MIXED"
    shutil.copy(zero / "optimizer_state.pt", zero / "a.bias" / "exp_avg.pt")
    with pytest.raises(IntegrityError) as caught:
        deepspeed_universal.open_source(universal)
    assert caught.value.code == "E_LAYOUT"


def test_universal_pointer_cannot_leave(universal):
    pointer = universal.parent / "latest_universal"
    pointer.write_text("../universal/global_step5_universal")
    with pytest.raises(IntegrityError) as caught:
        deepspeed_universal.open_source(universal.parent)
    assert caught.value.code == "E_PATH"


@pytest.mark.slow
def test_odd_values_in_universal_files_end_in_our_errors(universal, forge, flat, lies):
    clean = forge(GROUPS, 1, 2)
    options = [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]
    contents = {
        MODEL: clean.models[MODEL],
        "zero/optimizer_state.pt": {
            "zero_stage": 1,
            "param_groups": options,
            "loss_scaler": {"cur_scale": 1.0},
            "optimizer_state_dict": {
                "state": {0: {"step": clean.vector([3.0], ())}, 1: {"step": 3}},
                "param_groups": options,
            },
        },
        "zero/a.bias/exp_avg.pt": {"param": clean.vector([0.0] * 5), "cat_dim": 0},
    }
    opened = 0
    for name, content in contents.items():
        whole = (universal / name).read_bytes()
        for at in range(lies.mutate(copy.deepcopy(content), None, 10**9)):
            for odd in lies.some(at, 3 * FACTOR):
                changed = copy.deepcopy(content)
                lies.mutate(changed, odd, at)
                (universal / name).write_bytes(clean.archive(changed))
                try:
                    source = deepspeed_universal.open_source(universal)
                except FabricError:
                    continue
                opened += 1
                with source:
                    for each in set(source.names()) & clean.values.keys():
                        if each.startswith("model/"):
                            assert flat(source, each) == clean.values[each][1]
        (universal / name).write_bytes(whole)
    assert opened


def planned(bundle, **changes):
    changed = Bundle(
        changes.get("tensors", bundle.tensors),
        changes.get("aliases", bundle.aliases),
        changes.get("state", bundle.state),
    )
    return deepspeed_universal.SINK.plan(changed, SinkOptions())


def test_what_a_universal_checkpoint_cannot_hold(tmp_path, forge, engines):
    tag = forge(GROUPS, 1, 2).write(tmp_path)
    with deepspeed_zero.open_source(tag) as source:
        bundle = engines.bundle_of(source)
        model = {n: t for n, t in bundle.tensors.items() if n.startswith("model/")}
        cases = {
            "E_NO_OPTIMIZER": {"tensors": model},
            "E_OPTIMIZER": {"state": {}},
        }
        for code, changes in cases.items():
            with pytest.raises(ConfigError) as caught:
                planned(bundle, **changes)
            assert caught.value.code == code
        for name in ("../evil", "a/b", "..", "x" * 300, f"moe{EXPERTS}0.weight"):
            renamed = {
                key.replace("b.weight", name): each
                for key, each in bundle.tensors.items()
            }
            groups = copy.deepcopy(bundle.state["optimizer"]["param_groups"])
            groups[1]["params"] = [name]
            state = {**bundle.state, "optimizer": {"param_groups": groups}}
            with pytest.raises(ConfigError) as caught:
                planned(bundle, tensors=renamed, state=state)
            assert caught.value.code in ("E_NAME", "E_LAYOUT")
        lacking = dict(bundle.tensors)
        del lacking["optimizer/exp_avg/a.bias"]
        with pytest.raises(ConfigError, match="stale"):
            raise_with_step(planned, bundle, lacking)
        more = {**bundle.state, "rng": 1}
        assert [each.name for each in planned(bundle, state=more).ignored] == [
            "state.rng"
        ]


def raise_with_step(plan, bundle, tensors):
    try:
        plan(bundle, tensors=tensors)
    except ConfigError as error:
        raise ConfigError(f"{error} {error.next_step}") from error
