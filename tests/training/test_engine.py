import pytest
import torch

from fabric.core.errors import ConfigError
from fabric.core.ids import PeerId
from fabric.jobs.messages import Setting
from fabric.jobs.spec import JobSpec, ModelSpec, OuterSpec, TrainSpec
from training.data import Corpus, cut, order_key, split, windows
from training.worker import trainer as trainer_module
from training.worker.engine import NativeEngine
from training.worker.rounds import StepReady
from training.worker.trainer import Trainer

TEXT = b"".join(b"def f%d(x):\n    return x + %d\n" % (n, n) for n in range(4000))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpus(monkeypatch) -> Corpus:
    corpus = split(cut(TEXT), 0.2)
    monkeypatch.setattr(trainer_module, "load_corpus", lambda _spec: corpus)
    return corpus


@pytest.fixture
def job(spec) -> JobSpec:
    return spec(learning_rate=1.0, momentum=0.0, quantise="none", rounds=2)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(job):
    first, again = (NativeEngine(job.model, job.train) for _ in range(2))
    other = NativeEngine(job.model, TrainSpec(seed=1))
    assert torch.equal(first.flat, again.flat)
    assert not torch.equal(first.flat, other.flat)
    assert list(first.shapes) == sorted(first.shapes)


def test_named_tensors_are_views_of_the_flat_vector(job):
    engine = NativeEngine(job.model, job.train)
    named = engine.named_tensors(engine.flat)
    assert sum(t.numel() for t in named.values()) == engine.flat.numel()
    named["model.norm.weight"].fill_(5.0)
    assert engine._parameters["model.norm.weight"][0] == 5.0


def test_one_worker_without_momentum_or_quantisation_is_plain_adamw(job, corpus):
    """One participant, outer rate 1, momentum 0: DiLoCo is its inner optimiser."""
    trainer = Trainer(job, "me")
    plain = NativeEngine(job.model, job.train)
    trainer.hold_initial()
    for number in range(job.train.outer.rounds):
        while not trainer.inner_step():
            pass
        piece, _ = trainer.contribution()
        trainer.outer_step(StepReady(("me",), (piece.payload,), (piece.tokens,)))
        for step in range(job.train.outer.inner_steps):
            key = order_key(job.train.seed, number, "me", step)
            batch = windows(corpus.train, key, job.train.batch_size, 17)
            done = number * job.train.outer.inner_steps + step
            plain.step(batch, done / 4)
    assert trainer.state is not None
    assert trainer.state.round == 2
    assert torch.allclose(trainer.state.theta, plain.flat, atol=1e-6, rtol=0)


def test_a_contribution_left_out_leaves_the_earlier_residual(spec, corpus):
    trainer = Trainer(spec(rounds=9), "me")
    trainer.hold_initial()
    while not trainer.inner_step():
        pass
    piece, _ = trainer.contribution()
    trainer.outer_step(StepReady(("other",), (piece.payload,), (piece.tokens,)))
    assert not trainer._residual.any()
    while not trainer.inner_step():
        pass
    piece, _ = trainer.contribution()
    trainer.outer_step(StepReady(("me",), (piece.payload,), (piece.tokens,)))
    assert trainer._residual.any()


def test_states_are_served_by_name_and_only_the_newest_are_kept(spec, corpus):
    trainer = Trainer(spec(rounds=9), "me")
    names = [trainer.hold_initial()]
    for _ in range(3):
        while not trainer.inner_step():
            pass
        piece, _ = trainer.contribution()
        names.append(
            trainer.outer_step(StepReady(("me",), (piece.payload,), (piece.tokens,)))
        )
    assert [trainer.served(name) is not None for name in names] == [
        False,
        False,
        True,
        True,
    ]
    assert trainer.hold_kept(names[2])
    assert trainer.state is not None
    assert trainer.state.round == 2
    assert not trainer.hold_kept(names[1])


def test_training_lowers_the_loss_on_held_out_text(spec, corpus):
    trainer = Trainer(spec(inner_steps=30, learning_rate=1.0, momentum=0.0), "me")
    trainer.hold_initial()
    before = trainer.evaluate()
    while not trainer.inner_step():
        pass
    piece, loss = trainer.contribution()
    trainer.outer_step(StepReady(("me",), (piece.payload,), (piece.tokens,)))
    assert trainer.evaluate() < before - 0.3
    assert loss < before
    assert piece.tokens == 30 * 2 * 16


@pytest.mark.parametrize(
    "model",
    [
        ModelSpec(source="blob:ab"),
        ModelSpec(hidden_size=30, num_heads=4),
        ModelSpec(num_heads=4, num_kv_heads=3),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_the_reason(model):
    with pytest.raises(ConfigError):
        NativeEngine(model, TrainSpec(outer=OuterSpec()))


def test_a_decision_steers_its_own_outer_step_and_the_rounds_after(spec, corpus):
    """As a run whose spec said so from there on; without a decision, as submitted."""
    given = spec(rounds=9)
    steered = (
        Setting("train.outer.learning_rate", 0.25, PeerId("ann")),
        Setting("train.learning_rate", 1e-9, PeerId("ann")),
        Setting("train.seed", 7.0, PeerId("ann")),  # not steerable: left out
    )
    trainer, plain = Trainer(given, "me"), Trainer(given, "me")

    def round_of(one, settings):
        before = one.state.theta.clone()
        while not one.inner_step():
            pass
        piece, _ = one.contribution()
        name = one.outer_step(
            StepReady(("me",), (piece.payload,), (piece.tokens,), settings)
        )
        return name, (one.state.theta - before).norm()

    for one in (trainer, plain):
        one.hold_initial()
    first, moved = round_of(trainer, steered)
    other, plainly = round_of(plain, ())
    assert first != other
    assert moved == pytest.approx(
        float(plainly) * 0.25 / given.train.outer.learning_rate, rel=1e-3
    )
    start = trainer.engine.flat.clone()
    trainer.inner_step()
    assert (trainer.engine.flat - start).abs().max() < 1e-6  # the inner rate is tiny
    trainer.steer(())
    assert trainer._spec == given
