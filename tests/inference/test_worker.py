"""The stage worker without daemons: its process, and the forward against the oracle."""

import json
import sys
from pathlib import Path

import pytest
import trio

from fabric.core.errors import ConfigError
from fabric.net.worker_api import WorkerLimits
from fabric.net.worker_link import open_program, open_worker
from inference.worker_messages import COMMANDS, EVENTS, Assign, Loaded, Start, WorkerKey

pytestmark = pytest.mark.slow


async def test_one_stage_alone_generates_the_reference(model, tmp_path):
    from fabric.core.ids import PeerId
    from inference.messages import Sampling

    reference = json.loads((model / "reference.json").read_text())
    limits = WorkerLimits(scratch=tmp_path, readable=(model,))
    with trio.fail_after(60):
        async with open_worker("inference.worker", [], limits) as link:
            assert isinstance(EVENTS.decode_untrusted(await link.receive()), WorkerKey)
            assign = Assign(1, 0, 1, str(model), 4, 0, prefill_tokens=7)
            await link.send(COMMANDS.encode(assign))
            loaded = EVENTS.decode_untrusted(await link.receive())
            assert isinstance(loaded, Loaded)
            assert (loaded.layers, loaded.context_tokens) == ((0, 5), 128)
            for prompt in reference:
                sampling = Sampling(16)
                start = Start(prompt, PeerId("g"), tuple(prompt.encode()), sampling)
                await link.send(COMMANDS.encode(start))
            tokens = {prompt: [] for prompt in reference}
            ended = set()
            while len(ended) < len(reference):
                event = EVENTS.decode_untrusted(await link.receive())
                for _, token in getattr(event, "tokens", ()):
                    assert token.index == len(tokens[token.session])
                    tokens[token.session].append(token.token)
                if hasattr(event, "session"):
                    ended.add(event.session)
    assert tokens == reference


async def test_the_worker_holds_torch_and_neither_trio_nor_libp2p(tmp_path):
    script = Path(__file__).parent / "worker_modules.py"
    limits = WorkerLimits(scratch=tmp_path)
    with trio.fail_after(60):
        async with open_program([str(script)], [], limits) as link:
            assert await link.receive() == b"torch"


def test_a_daemon_that_serves_loads_no_torch():
    import subprocess

    code = (
        "import sys, inference.gateway_service, inference.service;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_a_missing_model_is_explained(tmp_path):
    from fabric.core.errors import Unavailable

    limits = WorkerLimits(scratch=tmp_path)
    with trio.fail_after(60):
        async with open_worker("inference.worker", [], limits) as link:
            await link.receive()
            assign = Assign(1, 0, 1, str(tmp_path), 4, 0, 7)
            await link.send(COMMANDS.encode(assign))
            with pytest.raises(Unavailable, match="E_NO_MODEL"):
                await link.receive()


def test_what_cannot_be_served_exactly_is_refused():
    from inference.worker.weights import shape_of

    plain = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 16,
    }
    assert shape_of(plain).head_size == 4
    for change in (
        {"model_type": "mistral"},
        {"rope_parameters": {"rope_type": "llama3"}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"hidden_size": "8"},
    ):
        with pytest.raises(ConfigError):
            shape_of(plain | change)


def test_the_nucleus_and_the_seed():
    import torch

    from inference.worker.pick import pick_token

    logits = torch.tensor([0.0, 3.0, 2.9, -5.0])
    assert pick_token(logits, 0, 1.0, 0, 0) == 1
    picks = [pick_token(logits, 1.0, 0.9, 3, i) for i in range(60)]
    assert set(picks) == {1, 2}
    assert picks == [pick_token(logits, 1.0, 0.9, 3, i) for i in range(60)]
    assert {pick_token(logits, 1.0, 0.01, 0, i) for i in range(20)} == {1}
    assert {pick_token(logits, 9.0, 1.0, 0, i) for i in range(200)} == {0, 1, 2, 3}


def test_a_canonical_checkpoint_is_read_as_well(model, tmp_path):
    import torch
    from safetensors.torch import load_file

    from checkpoints.torch_io.tensors import save_tensors
    from inference.worker.weights import open_weights

    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    save_tensors(
        tmp_path,
        1,
        {f"model/{name}": tensor for name, tensor in tensors.items()},
        {"model_config": config},
    )
    ours, theirs = open_weights(tmp_path / "step-1"), open_weights(model)
    assert ours.shape == theirs.shape
    for name in tensors:
        assert torch.equal(ours.tensor(name), theirs.tensor(name))
