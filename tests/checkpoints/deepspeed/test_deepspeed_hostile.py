"""What is damaged, mixed, missing or made to harm ends in an error that says so."""

import copy
import os
import random
import shutil

import pytest

from checkpoints.formats import deepspeed_zero
from checkpoints.formats.pickle_values import Global, TensorRef
from checkpoints.formats.pickle_writer import Call, Instance
from fabric.core.errors import FabricError, IntegrityError

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
GROUPS = [{"a.weight": (3, 5), "a.bias": (5,)}, {"b.weight": (7,)}]
RANK = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
STAGES = [1, 2, 3]


def refused(tag, code):
    with pytest.raises(FabricError) as caught:
        deepspeed_zero.open_source(tag)
    assert caught.value.code == code, caught.value
    assert caught.value.next_step
    return str(caught.value)


def optimizer(forged, rank):
    return forged.ranks[RANK.format(rank)]["optimizer_state_dict"]


def base(forged, rank):
    key = "optimizer_state_dict" if forged.stage == 3 else "base_optimizer_state"
    return optimizer(forged, rank)[key]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_is_named_and_never_zeros(tmp_path, forge, stage, rank):
    tag = forge(GROUPS, stage, 3).write(tmp_path)
    (tag / RANK.format(rank)).unlink()
    refused(tag, "E_MISSING_FILE")


@pytest.mark.parametrize("stage", STAGES)
def test_missing_model_states(tmp_path, forge, stage):
    tag = forge(GROUPS, stage, 3).write(tmp_path)
    (tag / (MODEL_3.format(1) if stage == 3 else MODEL)).unlink()
    refused(tag, "E_MISSING_FILE")
    for each in tag.glob("*model_states.pt"):
        each.unlink()
    refused(tag, "E_MISSING_FILE")


@pytest.mark.parametrize("stage", STAGES)
def test_all_optimizer_states_gone(tmp_path, forge, stage):
    tag = forge(GROUPS, stage, 2).write(tmp_path)
    for each in tag.glob("*optim_states.pt"):
        each.unlink()
    refused(tag, "E_MISSING_FILE")


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_of_another_save(tmp_path, forge, stage):
    tag = forge(GROUPS, stage, 2).write(tmp_path / "t1")
    later = forge(GROUPS, stage, 2, step=4.0).write(tmp_path / "t2")
    shutil.copy(later / RANK.format(1), tag / RANK.format(1))
    assert "step" in refused(tag, "E_MIXED")


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_of_another_world(tmp_path, forge, stage):
    tag = forge(GROUPS, stage, 3).write(tmp_path / "t1")
    two = forge(GROUPS, stage, 2).write(tmp_path / "t2")
    shutil.copy(two / RANK.format(1), tag / RANK.format(1))
    refused(tag, "E_MIXED")
    shutil.copy(two / RANK.format(0), tag / RANK.format(0))
    (tag / RANK.format(2)).unlink()
    refused(tag, "E_MIXED")


def test_options_and_counters_of_another_save(tmp_path, forge):
    forged = forge(GROUPS, 1, 2)
    base(forged, 1)["param_groups"][0]["lr"] = 0.2
    refused(forged.write(tmp_path / "lr"), "E_MIXED")
    forged = forge(GROUPS, 3, 2)
    forged.models[MODEL_3.format(1)]["global_steps"] = 6
    refused(forged.write(tmp_path / "steps"), "E_MIXED")
    forged = forge(GROUPS, 2, 2, step=6.0)
    assert "step 6" in refused(forged.write(tmp_path / "ahead"), "E_MIXED")


def test_two_files_of_one_rank(tmp_path, forge):
    tag = forge(GROUPS, 1, 2).write(tmp_path)
    shutil.copy(tag / RANK.format(1), tag / f"bf16_{RANK.format(1)}")
    refused(tag, "E_MIXED")
    (tag / f"bf16_{RANK.format(1)}").unlink()
    shutil.copy(tag / MODEL, tag / MODEL_3.format(0))
    refused(tag, "E_MIXED")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_truncated_anywhere(tmp_path, forge, stage):
    tag = forge(GROUPS, stage, 2).write(tmp_path)
    path = tag / RANK.format(1)
    whole = path.read_bytes()
    cuts = random.Random(stage).sample(range(len(whole)), 20 * FACTOR)
    for size in [0, 1, len(whole) - 1, *cuts]:
        path.write_bytes(whole[:size])
        refused(tag, "E_ARCHIVE")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_one_flipped_byte_is_never_an_element(tmp_path, forge, flat, stage):
    forged = forge(GROUPS, stage, 2)
    tag = forged.write(tmp_path)
    path = tag / RANK.format(0)
    whole = path.read_bytes()
    for at in random.Random(stage).sample(range(len(whole)), 60 * FACTOR):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            with deepspeed_zero.open_source(tag) as source:
                for name, (_, numbers) in forged.values.items():
                    if not name.startswith("optimizer/step"):
                        assert flat(source, name) == numbers
        except FabricError:
            pass


def test_parallel_models_are_refused_with_the_way_out(tmp_path, forge):
    tag = forge(GROUPS, 1, 2).write(tmp_path)
    for name in (
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
        "mp_rank_01_model_states.pt",
        "layer_03-model_00-model_states.pt",
    ):
        (tag / name).write_bytes(b"")
        refused(tag, "E_LAYOUT")
        (tag / name).unlink()
    for key, value in (
        ("mp_world_size", 2),
        ("checkpoint_parallel_dimensions", {"tp_degree": 2, "pp_degree": 1}),
        ("ds_autoep_layers", [{"expert_key_prefix": "x"}]),
        ("module", None),
    ):
        forged = forge(GROUPS, 1, 2)
        forged.models[MODEL][key] = value
        refused(forged.write(tmp_path / key), "E_LAYOUT")


def shape(*sizes):
    return Call(Global("torch", "Size"), (sizes,))


@pytest.mark.parametrize(
    ("stage", "lie", "code"),
    [
        (1, shape(3, 6), "E_GAP"),
        (1, shape(900), "E_GAP"),
        (1, shape(2), "E_LAYOUT"),
        (3, shape(3, 6), "E_LAYOUT"),
        (3, shape(2), "E_LAYOUT"),
        (1, shape(2**52), "E_GAP"),
        (3, shape(2**52, 2**52), "E_LAYOUT"),
        (1, shape(*[1] * 9), "E_LAYOUT"),
        (3, "five", "E_LAYOUT"),
        (1, [3, -5], "E_LAYOUT"),
    ],
)
def test_shapes_that_lie(tmp_path, forge, stage, lie, code):
    forged = forge(GROUPS, stage, 2)
    for model in forged.models.values():
        model["param_shapes"][0]["a.weight"] = lie
    refused(forged.write(tmp_path), code)


def test_slice_mappings_that_lie(tmp_path, forge):
    kind = Global("deepspeed.utils.tensor_fragment", "fragment_address")
    for index, address in enumerate(
        [Instance(kind, {"start": 1, "numel": 9}), Instance(kind, {"start": "0"}), 7]
    ):
        forged = forge(GROUPS, 1, 2)
        optimizer(forged, 0)["param_slice_mappings"][0]["a.weight"] = address
        refused(forged.write(tmp_path / str(index)), "E_LAYOUT")


@pytest.mark.parametrize("stage", STAGES)
def test_moments_of_another_length_or_gone(tmp_path, forge, stage):
    forged = forge(GROUPS, stage, 2)
    base(forged, 1)["state"][0]["exp_avg"] = forged.vector([0.0] * 5)
    refused(forged.write(tmp_path / "length"), "E_LAYOUT")
    forged = forge(GROUPS, stage, 2)
    del base(forged, 1)["state"][0]["exp_avg_sq"]
    refused(forged.write(tmp_path / "gone"), "E_GAP")
    forged = forge(GROUPS, stage, 2)
    base(forged, 1)["state"][1]["exp_avg"] = "none"
    assert refused(forged.write(tmp_path / "text"), "E_GAP")


def test_no_moments_at_all_is_said(tmp_path, forge):
    forged = forge(GROUPS, 1, 2)
    for rank in range(2):
        base(forged, rank)["state"] = {}
    with deepspeed_zero.open_source(forged.write(tmp_path)) as source:
        assert "optimizer/a.bias" in [each.name for each in source.ignored]


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_in_a_pickle_runs(tmp_path, forge, stage):
    marker = tmp_path / "ran"
    call = Call(Global("os", "system"), (f"touch {marker}",))
    forged = forge(GROUPS, stage, 2)
    optimizer(forged, 1)["loss_scaler"] = call
    refused(forged.write(tmp_path / "rank"), "E_PICKLE")
    forged = forge(GROUPS, stage, 2)
    next(iter(forged.models.values()))["client"] = call
    refused(forged.write(tmp_path / "model"), "E_PICKLE")
    evil = Call(Global("deepspeed.launcher.runner", "main"), (f"touch {marker}",))
    forged = forge(GROUPS, stage, 2)
    next(iter(forged.models.values()))["client"] = evil
    with deepspeed_zero.open_source(forged.write(tmp_path / "record")) as source:
        assert "client" in "".join(each.name for each in source.ignored)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../t1", "/etc", "..", "a/b", "", "t1\0"])
def test_latest_cannot_leave_its_directory(tmp_path, forge, name):
    forge(GROUPS, 1, 2).write(tmp_path / "t1")
    root = tmp_path / "root"
    root.mkdir()
    (root / "latest").write_text(name)
    with pytest.raises(IntegrityError) as caught:
        deepspeed_zero.open_source(root)
    assert caught.value.code == "E_PATH"
    (root / "latest").write_text("t9")
    refused(root, "E_MISSING_FILE")


def test_names_that_no_tensor_has(tmp_path, forge):
    refused(forge([{"a\nb": (3,)}], 1, 2).write(tmp_path), "E_NAME")
    forged = forge(GROUPS, 1, 2)
    forged.models[MODEL]["shared_params"] = {"x": "nowhere"}
    with pytest.raises(IntegrityError) as caught:
        deepspeed_zero.open_source(forged.write(tmp_path / "alias"))
    assert caught.value.code == "E_ALIAS"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_odd_values_anywhere_end_in_our_errors(tmp_path, forge, flat, lies, stage):
    """Whatever stands where something belongs: an error of ours, or the elements."""
    opened = 0
    names = [RANK.format(0), RANK.format(1)]
    names.append(MODEL_3.format(0) if stage == 3 else MODEL)
    clean = forge(GROUPS, stage, 2)
    clean.write(tmp_path)
    for name in names:
        content = {**clean.ranks, **clean.models}[name]
        whole = (tmp_path / name).read_bytes()
        count = lies.mutate(copy.deepcopy(content), None, 10**9)
        for at in range(count):
            for odd in lies.some(at, 2 * FACTOR):
                changed = copy.deepcopy(content)
                lies.mutate(changed, odd, at)
                (tmp_path / name).write_bytes(clean.archive(changed))
                try:
                    source = deepspeed_zero.open_source(tmp_path)
                except FabricError:
                    continue
                opened += 1
                with source:
                    for each in set(source.names()) & clean.values.keys():
                        if "/exp_avg" in each or each.startswith("model/"):
                            assert flat(source, each) == clean.values[each][1]
        (tmp_path / name).write_bytes(whole)
    assert opened


def test_a_tensor_is_not_a_parameter_of_two_groups(tmp_path, forge):
    forged = forge([{"a": (3,)}, {"b": (3,)}], 3, 2)
    for model in forged.models.values():
        model["param_shapes"][1] = {"a": shape(3)}
    refused(forged.write(tmp_path), "E_LAYOUT")
    assert isinstance(forged.vector([1.0]), TensorRef)
