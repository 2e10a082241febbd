"""Export and import, without torch: every tensor accounted for and verified."""

import json
import os
import pickle

import pytest

from checkpoints.conversion import convert
from checkpoints.conversion_plan import ConvertOptions
from checkpoints.formats import single_file
from checkpoints.formats.extent_source import ExtentSource
from checkpoints.model_tensors import expected_tensors
from checkpoints.parts import bytes_source
from checkpoints.reader import CheckpointReader
from checkpoints.safetensors_io import read_header_untrusted
from checkpoints.writer import CheckpointWriter
from fabric.core.errors import ConfigError, IntegrityError, ResourceExhausted

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path, lab):
    """A function that saves a small model and returns its directory."""

    def save(config=CONFIG, skip=(), aliases=None, replace=None, state=None):
        tensors = {
            name: ("BF16", shape, lab.content(name, "BF16", shape))
            for name, shape in expected_tensors(config).items()
            if name not in skip
        }
        tensors.update(replace or {})
        sources = [bytes_source(f"model/{n}", *tensor) for n, tensor in tensors.items()]
        momentum = lab.content("m", "F32", (4,))
        sources.append(bytes_source("outer/momentum/x", "F32", (4,), momentum))
        with CheckpointWriter(tmp_path / "ckpt", 1) as writer:
            part = writer.write("w", sources)
            writer.commit(
                [part],
                state={"model_config": config, "round": 4} if state is None else state,
                aliases=aliases,
            )
        return tmp_path / "ckpt"

    return save


def export_huggingface(source, target, on_progress=lambda *_: None, **options):
    chosen = ConvertOptions(to="huggingface", **options)
    return convert(source, target, chosen, on_progress=on_progress)


def import_huggingface(source, target, **options):
    return convert(source, target, ConvertOptions(to="canonical", **options))


def exported(directory):
    """Return name -> bytes of all safetensors files in a directory."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with single_file.open_source(path) as file:
            for name in file.names():
                content = b"".join(map(bytes, file.windows(name)))
                found[name.removeprefix("model/")] = content
    return found


def outcomes(report, action):
    return sorted(each.source for each in report.tensors if each.action == action)


def test_exports_every_tensor_and_names_what_it_leaves(tmp_path, model, lab):
    target = tmp_path / "hf"
    calls = []
    report = export_huggingface(model(), target, on_progress=lambda *c: calls.append(c))
    expected = expected_tensors(CONFIG)
    assert exported(target) == {
        name: lab.content(name, "BF16", shape) for name, shape in expected.items()
    }
    config = json.loads((target / "config.json").read_text())
    assert config == {**CONFIG, "architectures": ["LlamaForCausalLM"]}
    assert report.verified
    assert outcomes(report, "copied") == sorted(f"model/{name}" for name in expected)
    assert outcomes(report, "ignored") == ["outer/momentum/x"]
    assert all(each.reason for each in report.tensors if each.action != "copied")
    (left,) = report.ignored
    assert (left.name, left.reason) == (
        "state.round",
        "no place in a Hugging Face model",
    )
    assert calls[-1] == (2 * report.copied_bytes,) * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "hf"]


def test_shards_have_an_index(tmp_path, model):
    report = export_huggingface(model(), tmp_path / "hf", max_shard_bytes=600)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.copied_bytes
    assert index["weight_map"].keys() == expected_tensors(CONFIG).keys()
    for name, file in index["weight_map"].items():
        with (tmp_path / "hf" / file).open("rb") as opened:
            header = read_header_untrusted(opened)
        assert name in header.tensors
        assert header.metadata == {"format": "pt"}
        sizes = [
            end - begin
            for each in header.tensors.values()
            for begin, end in [each.data_offsets]
        ]
        assert sum(sizes) <= 600 or len(sizes) == 1
    assert len(set(index["weight_map"].values())) > 2


@pytest.mark.parametrize("tied_in_config", [True, False])
def test_tied_weights_by_alias(tmp_path, model, lab, tied_in_config):
    config = {**CONFIG, "tie_word_embeddings": tied_in_config}
    aliases = {f"model/{HEAD}": f"model/{EMBEDDING}"}
    source = model(config, skip=[HEAD], aliases=aliases)
    report = export_huggingface(source, tmp_path / "hf")
    found = exported(tmp_path / "hf")
    # a config that does not tie would get a random head without the copy
    assert (HEAD in found) == (not tied_in_config)
    assert outcomes(report, "tied") == ([f"model/{HEAD}"] if tied_in_config else [])
    assert found.get(HEAD, found[EMBEDDING]) == found[EMBEDDING]


def test_tied_weights_by_bytes(tmp_path, model, lab):
    config = {**CONFIG, "tie_word_embeddings": True}
    same = ("BF16", (16, 8), lab.content(EMBEDDING, "BF16", (16, 8)))
    report = export_huggingface(model(config, replace={HEAD: same}), tmp_path / "hf")
    assert HEAD not in exported(tmp_path / "hf")
    assert outcomes(report, "tied") == [f"model/{HEAD}"]


def test_a_config_that_ties_what_differs_is_refused(tmp_path, model):
    source = model({**CONFIG, "tie_word_embeddings": True})
    with pytest.raises(ConfigError) as refused:
        export_huggingface(source, tmp_path / "hf")
    assert refused.value.code == "E_TIED_DIFFER"
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"skip": ["model.layers.1.mlp.up_proj.weight"]}, "E_MODEL_TENSORS"),
        ({"replace": {"extra": ("U8", (1,), b"x")}}, "E_MODEL_TENSORS"),
        ({"replace": {HEAD: ("BF16", (1, 8), bytes(16))}}, "E_MODEL_TENSORS"),
        ({"state": {}}, "E_MODEL_CONFIG"),
        ({"state": {"model_config": {"model_type": "llama"}}}, "E_MODEL_CONFIG"),
    ],
)
def test_a_model_that_is_not_its_config_is_refused(tmp_path, model, change, code):
    with pytest.raises(ConfigError) as refused:
        export_huggingface(model(**change), tmp_path / "hf")
    assert refused.value.code == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


def test_unknown_model_types_are_exported_with_a_note(tmp_path, model):
    state = {"model_config": {"model_type": "other"}, "generation_config": {"a": 1}}
    report = export_huggingface(model(state=state), tmp_path / "hf")
    assert "not compared" in report.notes[0]
    assert (tmp_path / "hf/generation_config.json").is_file()


def test_a_target_with_something_in_it_is_left_alone(tmp_path, model):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine").touch()
    with pytest.raises(ConfigError) as refused:
        export_huggingface(model(), tmp_path / "hf")
    assert refused.value.code == "E_EXISTS"
    assert os.listdir(tmp_path / "hf") == ["mine"]


def test_a_damaged_source_leaves_no_target(tmp_path, model):
    source = model()
    path = source / "step-1/w-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        export_huggingface(source, tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


def test_a_disk_that_forgets_is_noticed(tmp_path, model, monkeypatch):
    real = ExtentSource.windows

    def forgetful(self, name, window_bytes=1 << 20):
        return iter([bytes(len(b"".join(map(bytes, real(self, name)))))])

    monkeypatch.setattr(ExtentSource, "windows", forgetful)
    with pytest.raises(IntegrityError) as refused:
        export_huggingface(model(), tmp_path / "hf")
    assert refused.value.code == "E_VERIFY"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt"]


def test_a_full_disk_keeps_what_is_whole_for_the_next_run(tmp_path, model, monkeypatch):
    source = model()
    real, left = os.write, [1500]

    def full(fd, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr("checkpoints.hashed_file.os.write", full)
    with pytest.raises(ResourceExhausted) as refused:
        export_huggingface(source, tmp_path / "hf", max_shard_bytes=600, workers=1)
    assert refused.value.code == "E_DISK_FULL"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "hf.tmp"]
    monkeypatch.undo()
    report = export_huggingface(source, tmp_path / "hf", max_shard_bytes=600)
    assert report.resumed_files > 0
    assert report.verified
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "hf"]


@pytest.mark.parametrize("max_shard_bytes", [600, 1 << 30])
def test_import_is_the_inverse(tmp_path, model, max_shard_bytes):
    source = model()
    export_huggingface(source, tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    report = import_huggingface(tmp_path / "hf", tmp_path / "back", step=9)
    assert report.verified
    (left,) = report.ignored
    assert (left.name, left.reason) == ("tokenizer.json", "not part of a checkpoint")
    assert len(outcomes(report, "copied")) == len(expected_tensors(CONFIG))
    with CheckpointReader(source) as a, CheckpointReader(tmp_path / "back") as b:
        assert b.manifest.step == 9
        assert b.root == report.root
        for name in expected_tensors(CONFIG):
            stored = f"model/{name}"
            assert a.read_tensor(stored) == b.read_tensor(stored)
            assert a.entry(stored).dtype == b.entry(stored).dtype


def test_import_records_a_tied_head_as_alias(tmp_path, model):
    config = {**CONFIG, "tie_word_embeddings": True}
    aliases = {f"model/{HEAD}": f"model/{EMBEDDING}"}
    export_huggingface(model(config, [HEAD], aliases), tmp_path / "hf")
    import_huggingface(tmp_path / "hf", tmp_path / "back")
    with CheckpointReader(tmp_path / "back") as reader:
        assert reader.manifest.aliases == aliases


def spoil_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda d: spoil_index(d, lambda m: m.popitem()), "E_INDEX"),
        (lambda d: spoil_index(d, lambda m: m.update(x=m[HEAD])), "E_INDEX"),
        (lambda d: spoil_index(d, lambda m: m.update(x="../m.safetensors")),
         "E_FILE_NAME"),
        (lambda d: spoil_index(d, lambda m: m.update(x=3)), "E_JSON"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "E_JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), "E_JSON"),
        (lambda d: os.truncate(sorted(d.glob("*.safetensors"))[0], 70),
         "E_SAFETENSORS"),
        (lambda d: sorted(d.glob("*.safetensors"))[0].unlink(), "E_MISSING_FILE"),
    ],
    ids=range(8),
)  # fmt: skip
def test_damaged_models_are_not_imported(tmp_path, model, spoil, code):
    export_huggingface(model(), tmp_path / "hf", max_shard_bytes=600)
    spoil(tmp_path / "hf")
    with pytest.raises((IntegrityError, ConfigError)) as refused:
        import_huggingface(tmp_path / "hf", tmp_path / "back")
    assert refused.value.code == code
    assert not (tmp_path / "back").exists()


def test_a_bare_pickle_is_not_read(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(IntegrityError) as refusal:
        import_huggingface(tmp_path / "hf", tmp_path / "back")
    assert refusal.value.code == "E_ARCHIVE"
    with pytest.raises(ConfigError) as refused:
        import_huggingface(
            tmp_path / "hf", tmp_path / "back", from_format="huggingface"
        )
    assert "huggingface-bin" in refused.value.next_step


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_from_pretrained_gives_identical_logits(tmp_path, tied, biased):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from checkpoints.torch_io.tensors import save_tensors

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=tied,
        attention_bias=biased,
        mlp_bias=biased,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    state = {"model_config": json.loads(config.to_json_string())}
    save_tensors(tmp_path / "ckpt", 5, tensors, state)
    report = export_huggingface(tmp_path / "ckpt", tmp_path / "hf")
    assert report.verified
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    loaded.save_pretrained(tmp_path / "again")
    import_huggingface(tmp_path / "again", tmp_path / "back")
    with (
        CheckpointReader(tmp_path / "ckpt") as a,
        CheckpointReader(tmp_path / "back") as b,
    ):
        assert a.names() == b.names()
        assert all(a.read_tensor(name) == b.read_tensor(name) for name in a.names())
