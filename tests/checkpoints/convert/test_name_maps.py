"""Name maps against transformers: there, back, bit by bit, and the same logits."""

import json

import pytest

from checkpoints.conversion import convert
from checkpoints.conversion_plan import ConvertOptions
from checkpoints.formats.registry import open_source
from checkpoints.model_tensors import expected_tensors, family_of, ties_embeddings
from checkpoints.name_maps import load_map, map_names
from checkpoints.parts import bytes_source
from checkpoints.writer import CheckpointWriter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED = {"shared_expert_intermediate_size": 40}
FAMILIES = {
    "llama": SMALL,
    "llama-biased": SMALL | {"attention_bias": True, "mlp_bias": True},
    "llama-tied": SMALL | {"tie_word_embeddings": True},
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 16},
    "mixtral": SMALL | {"num_local_experts": 4},
    "qwen2_moe": SMALL | EXPERTS | SHARED,
    "qwen2_moe-dense": SMALL | EXPERTS | SHARED | {"mlp_only_layers": [0]},
    "qwen3_moe": SMALL | EXPERTS | {"head_dim": 8},
    "qwen3_moe-step": SMALL | EXPERTS | {"head_dim": 8, "decoder_sparse_step": 2},
    "gpt2": GPT2,
    "gpt2-wide": GPT2 | {"n_inner": 40, "tie_word_embeddings": False},
    "phi3": SMALL,
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A function that returns a random model of a family, and its directory."""
    known = {}

    def make(case):
        if case not in known:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(
                case.partition("-")[0], **FAMILIES[case]
            )
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.normal_(std=0.2)
            path = tmp_path_factory.mktemp(case) / "hf"
            model.save_pretrained(path)
            known[case] = (model, path)
        return known[case]

    return make


def content(path):
    """Name -> (type, shape, bytes) of every tensor and alias."""
    with open_source(path) as source:
        return {
            name: (
                source.entry(name).dtype,
                source.entry(name).shape,
                b"".join(map(bytes, source.windows(name))),
            )
            for name in source.names()
        }


def tensors(path):
    """Name -> float32 tensor, without the section."""
    return {
        name.removeprefix("model/"): torch.frombuffer(
            bytearray(data), dtype=torch.float32
        ).reshape(shape)
        for name, (_, shape, data) in content(path).items()
    }


def run(source, target, to, **options):
    report = convert(source, target, ConvertOptions(to=to, **options))
    assert report.verified
    return report


@pytest.mark.parametrize("case", FAMILIES)
def test_the_list_of_tensors_is_that_of_the_class(stored, case):
    _, path = stored(case)
    config = json.loads((path / "config.json").read_text())
    expected = expected_tensors(config)
    if ties_embeddings(config):
        for head in family_of(config).tied:
            del expected[head]
    found = {name: tuple(t.shape) for name, t in tensors(path).items()}
    tied = found.keys() - expected.keys()
    assert tied <= family_of(config).tied.keys()
    assert expected == {name: found[name] for name in found.keys() - tied}


def forms():
    """Every family with every form that a map of it has."""
    for case in FAMILIES:
        model_type = case.partition("-")[0]
        known = {
            form
            for each in map(load_map, map_names())
            if model_type in each.model_types
            for form in (each.parts_form, each.whole_form)
        }
        yield from ((case, form) for form in sorted(known - {"huggingface"}))


@pytest.mark.parametrize(("case", "form"), list(forms()))
def test_there_and_back_is_the_same_model(tmp_path, stored, case, form):
    model, path = stored(case)
    there = run(path, tmp_path / "there", "canonical", form=form)
    actions = {each.action for each in there.tensors}
    assert actions & {"merged", "split", "renamed"}
    assert actions <= {"copied", "merged", "split", "renamed", "tied"}
    back = run(tmp_path / "there", tmp_path / "back", "huggingface")
    assert back.maps == there.maps[::-1]
    assert content(tmp_path / "back") == content(path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_are_those_of_the_class_of_transformers_5(tmp_path, stored, case):
    model, path = stored(case)
    run(path, tmp_path / "there", "canonical", form="transformers5")
    found = tensors(tmp_path / "there/step-0")
    own = model.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)


def interleaved(q, k, v, groups):
    """Megatron-core's linear_qkv, by views of torch."""
    head = k.shape[0] // groups
    parts = [each.reshape(groups, -1, head, *each.shape[1:]) for each in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


@pytest.mark.parametrize("case", ["llama", "qwen2", "mixtral", "qwen3_moe"])
def test_megatron_interleaves_by_group(tmp_path, stored, case):
    _, path = stored(case)
    run(path, tmp_path / "there", "canonical", form="megatron")
    own, found = tensors(path), tensors(tmp_path / "there/step-0")
    for layer in range(2):
        old = f"model.layers.{layer}.self_attn."
        new = f"decoder.layers.{layer}.self_attention.linear_qkv.weight"
        q, k, v = (own[f"{old}{name}_proj.weight"] for name in "qkv")
        assert torch.equal(found[new], interleaved(q, k, v, 2))


def test_gpt2_goes_over_linear_matrices_to_megatron(tmp_path, stored):
    _, path = stored("gpt2")
    report = run(path, tmp_path / "there", "canonical", form="megatron")
    assert report.maps == ["gpt2-linear", "megatron-gpt2"]
    own, found = tensors(path), tensors(tmp_path / "there/step-0")
    q, k, v = own["transformer.h.1.attn.c_attn.weight"].T.chunk(3)
    new = "decoder.layers.1.self_attention.linear_qkv."
    assert torch.equal(found[new + "weight"], interleaved(q, k, v, 4))
    q, k, v = own["transformer.h.1.attn.c_attn.bias"].chunk(3)
    assert torch.equal(found[new + "bias"], interleaved(q, k, v, 4))
    assert torch.equal(
        found["decoder.layers.1.mlp.linear_fc1.weight"],
        own["transformer.h.1.mlp.c_fc.weight"].T,
    )
    turned = {each.source for each in report.tensors if each.turned}
    assert "model/transformer.h.1.mlp.c_fc.weight" in turned
    assert "model/transformer.h.1.ln_1.weight" not in turned


def test_phi3_is_llama_fused(tmp_path, stored):
    _, path = stored("phi3")
    run(path, tmp_path / "there", "canonical", form="split")
    own, found = tensors(path), tensors(tmp_path / "there/step-0")
    q, k, v = own["model.layers.0.self_attn.qkv_proj.weight"].split([32, 16, 16])
    for name, part in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(found[f"model.layers.0.self_attn.{name}_proj.weight"], part)


def save(directory, values, state):
    """Save tensors as a canonical step."""
    sources = [
        bytes_source(name, "F32", tuple(value.shape), value.numpy().tobytes())
        for name, value in values.items()
    ]
    with CheckpointWriter(directory, 0) as writer:
        writer.commit([writer.write("w", sources)], state=state)


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen2_moe", "gpt2"])
def test_moments_go_the_way_of_their_weights(tmp_path, stored, case):
    """A map is linear: of moments that are multiples, the result is the multiple."""
    _, path = stored(case)
    config = json.loads((path / "config.json").read_text())
    with open_source(path) as source:
        tied = set(source.aliases)
    own = {n: t for n, t in tensors(path).items() if f"model/{n}" not in tied}
    values = {f"model/{name}": each for name, each in own.items()}
    for slot, factor in (("exp_avg", 2.0), ("exp_avg_sq", 4.0)):
        values |= {
            f"optimizer/{slot}/{name}": each * factor for name, each in own.items()
        }
    values |= {f"optimizer/step/{name}": torch.tensor(7.0) for name in own}
    groups = [{"lr": 0.5, "params": sorted(own)}]
    save(tmp_path / "c", values, {"model_config": config, "groups": groups})
    report = run(tmp_path / "c", tmp_path / "m", "canonical", form="megatron")
    found = tensors(tmp_path / "m/step-0")
    names = {name for name in found if not name.startswith("optimizer/")}
    for name in names:
        assert torch.equal(found[f"optimizer/exp_avg/{name}"], found[name] * 2)
        assert torch.equal(found[f"optimizer/exp_avg_sq/{name}"], found[name] * 4)
        assert found[f"optimizer/step/{name}"] == 7
    assert len(found) == 4 * len(names)
    assert {each.source for each in report.tensors} == set(values)
    with open_source(tmp_path / "m") as source:
        assert set(source.state["groups"][0]["params"]) == names
    run(tmp_path / "m", tmp_path / "back", "canonical", form="huggingface")
    assert content(tmp_path / "back") == content(tmp_path / "c")


def stacked(values):
    """As Megatron's distributed checkpoints hold layers: one tensor for all of them."""
    found = {}
    for name, value in values.items():
        head, _, tail = name.partition(".layers.")
        if not tail:
            found[name] = value
            continue
        layer, _, rest = tail.partition(".")
        key = f"{head}.layers.{rest}"
        found.setdefault(key, {})[int(layer)] = value
    return {
        name: torch.stack([value[k] for k in sorted(value)])
        if isinstance(value, dict)
        else value
        for name, value in found.items()
    }


@pytest.mark.parametrize("case", ["llama", "mixtral", "gpt2"])
def test_stacked_layers_and_experts_and_a_padded_vocabulary(tmp_path, stored, case):
    _, path = stored(case)
    run(path, tmp_path / "there", "canonical", form="megatron")
    with open_source(tmp_path / "there") as source:
        state, tied = dict(source.state), set(source.aliases)
    flat = {
        name: value
        for name, value in tensors(tmp_path / "there/step-0").items()
        if f"model/{name}" not in tied
    }
    experts, rest = {}, {}
    for name, value in flat.items():
        before, found, after = name.partition(".local_experts.")
        if not found:
            rest[name] = value
            continue
        number, _, tail = after.partition(".")
        key = f"{before}.experts.{tail}"
        experts.setdefault(key, {})[int(number)] = value
    rest |= {k: torch.stack([v[n] for n in sorted(v)]) for k, v in experts.items()}
    rest["embedding.word_embeddings.weight"] = torch.cat(
        [rest["embedding.word_embeddings.weight"], torch.ones(8, 32)]
    )
    if "output_layer.weight" in rest:
        rest["output_layer.weight"] = torch.cat(
            [rest["output_layer.weight"], torch.ones(8, 32)]
        )
    values = {f"model/{name}": value for name, value in stacked(rest).items()}
    values["model/decoder.layers.0.self_attention._extra_state"] = torch.ones(3)
    save(tmp_path / "s", values, state)
    report = run(tmp_path / "s", tmp_path / "back", "huggingface")
    assert content(tmp_path / "back") == content(path)
    reasons = {each.name: each.reason for each in report.ignored}
    by_source = {each.source: each for each in report.tensors}
    embedding = by_source["model/embedding.word_embeddings.weight"]
    assert "rows 64..72 are padding" in embedding.reason
    assert by_source["model/decoder.layers.0.self_attention._extra_state"].action == (
        "ignored"
    )
    assert not any("extra_state" in name for name in reasons)
