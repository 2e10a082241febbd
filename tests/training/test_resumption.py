"""Which checkpoints a job can go on from, and that it does so bit by bit."""

import msgspec
import pytest

from checkpoints.manifest import Manifest, TensorEntry
from checkpoints.reader import CheckpointReader
from fabric.core.errors import ConfigError
from fabric.jobs.spec import JobSpec, ModelSpec, OuterSpec, TrainSpec
from tests.training.conftest import tiny_spec
from training.resumption import parameter_shapes, resume_round, resume_tensors

pytest.importorskip("torch")


def manifest(model, *, at=3, **changes):
    tensors = {
        name: TensorEntry("F32", shape, ())
        for name, shape in resume_tensors(model).items()
    }
    return Manifest(
        format="fabric-checkpoint",
        version=1,
        step=at,
        tensors={**tensors, **changes},
        files={},
        aliases={},
        state={"round": at},
        layout={},
        parent="",
    )


MODEL = ModelSpec(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2)
SPEC = JobSpec(model=MODEL, train=TrainSpec(outer=OuterSpec(rounds=5)))


def test_the_shapes_are_those_that_the_engine_builds():
    from training.worker.engine import NativeEngine

    for model in (MODEL, tiny_spec().model, tiny_spec(wide=True).model):
        engine = NativeEngine(model, TrainSpec())
        assert parameter_shapes(model) == engine.shapes


def test_a_checkpoint_that_fits_says_its_round():
    assert resume_round(SPEC, manifest(MODEL)) == 3
    extra = {"optimizer/exp_avg/x": TensorEntry("F32", (1,), ())}
    assert resume_round(SPEC, manifest(MODEL, **extra)) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 2}, "is missing"),
        ({"hidden_size": 64}, "is \\[256, 32"),
    ],
)
def test_another_model_is_refused_by_the_first_difference(change, reason):
    spec = msgspec.structs.replace(SPEC, model=msgspec.structs.replace(MODEL, **change))
    with pytest.raises(ConfigError, match=reason) as refusal:
        resume_round(spec, manifest(MODEL))
    assert (refusal.value.code, bool(refusal.value.next_step)) == ("E_RESUME", True)


def test_what_no_run_wrote_is_refused():
    bare = manifest(MODEL)
    weights = {n: t for n, t in bare.tensors.items() if n.startswith("model/")}
    cases = {
        "no outer momentum": msgspec.structs.replace(bare, tensors=weights),
        "ends at 5": manifest(MODEL, at=5),
        "which round": msgspec.structs.replace(bare, state={"round": True}),
        "is BF16": manifest(
            MODEL, **{"model/model.norm.weight": TensorEntry("BF16", (32,), ())}
        ),
        "outer/momentum/.* is F16, a run goes on in F32": manifest(
            MODEL, **{"outer/momentum/model.norm.weight": TensorEntry("F16", (32,), ())}
        ),
        "more than the job has": manifest(
            MODEL, **{"model/extra": TensorEntry("F32", (1,), ())}
        ),
    }
    for reason, case in cases.items():
        with pytest.raises(ConfigError, match=reason):
            resume_round(SPEC, case)


@pytest.mark.slow
def test_a_resumed_trainer_starts_from_the_saved_state(tmp_path):
    from training.worker.save import save_checkpoint
    from training.worker.trainer import Trainer

    spec = tiny_spec()
    first = Trainer(spec, "me")
    first.hold_initial()
    while not first.inner_step():
        pass
    saved_state = first.state_of(0)
    ahead = msgspec.structs.replace(spec, resume="ab" * 32, resume_round=2)
    state = type(saved_state)(2, saved_state.theta + 1, saved_state.momentum - 1)
    save_checkpoint(tmp_path, spec, first.engine, state)
    with CheckpointReader(tmp_path) as reader:
        assert resume_round(spec, reader.manifest) == 2
    again = Trainer(ahead, "me", tmp_path)
    assert again.first_round == 2
    assert again.hold_initial() == ""
    assert again.state.to_bytes() == state.to_bytes()
    wrong = msgspec.structs.replace(ahead, resume_round=1)
    with pytest.raises(ConfigError, match="of round 2"):
        Trainer(wrong, "me", tmp_path)
