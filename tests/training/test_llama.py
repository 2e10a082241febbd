"""The trained Llama and its optimiser against transformers and torch.optim."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.jobs.spec import ModelSpec, TrainSpec
from training.worker.engine import NativeEngine, scheduled_rate
from training.worker.llama import config_json

SHAPES = [
    ModelSpec(),
    ModelSpec(hidden_size=32, intermediate_size=48, num_layers=1, context_tokens=16),
    ModelSpec(hidden_size=30, intermediate_size=50, num_heads=3, num_kv_heads=3),
    ModelSpec(hidden_size=36, intermediate_size=50, num_heads=6, context_tokens=33),
    ModelSpec(num_layers=2, num_kv_heads=1, context_tokens=1),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference():
    """Return transformers' model with our initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(spec, engine):
        model = LlamaForCausalLM(LlamaConfig(**config_json(spec))).float()
        named = engine.named_tensors(engine.flat)
        model.load_state_dict({name: value.clone() for name, value in named.items()})
        return model

    return build


@pytest.mark.slow
@pytest.mark.parametrize("spec", SHAPES, ids=repr)
def test_steps_are_those_of_transformers_and_torchs_adamw_bit_for_bit(spec, reference):
    train = TrainSpec(batch_size=3, weight_decay=0.3, grad_clip=0.5)
    engine = NativeEngine(spec, train)
    model = reference(spec, engine)
    named = dict(sorted(model.named_parameters()))
    assert list(named) == list(engine.shapes)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() > 1]},
            {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0},
        ],
        betas=(0.9, 0.95),
        weight_decay=train.weight_decay,
    )
    draw = torch.Generator().manual_seed(1)
    size = (train.batch_size, spec.context_tokens + 1)
    for step in range(6):
        tokens = torch.randint(256, size, generator=draw)
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, 256), tokens[:, 1:].reshape(-1)
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), train.grad_clip)
        for group in optimiser.param_groups:
            group["lr"] = scheduled_rate(train, engine._optimiser.age, step / 6)
        optimiser.step()
        assert engine.step([bytes(row) for row in tokens.tolist()], step / 6) == loss
        theirs = torch.cat([p.detach().reshape(-1) for p in named.values()])
        assert torch.equal(engine.flat, theirs)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
def test_transformers_reads_our_config_as_its_own(heads, groups, half, layers):
    from transformers import LlamaConfig

    spec = ModelSpec(
        hidden_size=2 * half * heads * groups,
        num_heads=heads * groups,
        num_kv_heads=heads,
        num_layers=layers,
    )
    theirs = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=256,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.context_tokens,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    assert LlamaConfig(**config_json(spec)).to_dict() == theirs.to_dict()


@pytest.mark.slow
def test_a_step_imports_neither_transformers_nor_the_compiler():
    program = """
import sys
from fabric.jobs.spec import ModelSpec, TrainSpec
import training.worker.participant
from training.worker.engine import NativeEngine, scheduled_rate
NativeEngine(ModelSpec(), TrainSpec()).step([bytes(129)], 0.5)
heavy = {"transformers", "torch._dynamo", "sympy"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
