"""Models in files of torch.save, with an index: read as data, whole, or refused."""

from __future__ import annotations

import json
import os
import pickle

import pytest

from checkpoints.formats.registry import open_source
from fabric.core.errors import ConfigError, IntegrityError

torch = pytest.importorskip("torch")

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def weights():
    generator = torch.Generator().manual_seed(5)
    names = (EMBED, "model.layers.0.w", "model.layers.1.w", "model.norm.weight")
    return {
        name: torch.randn(6, 3 + at, generator=generator).to(dtype)
        for at, (name, dtype) in enumerate(
            zip(names, (torch.float32, torch.bfloat16) * 2, strict=True)
        )
    }


def shard(directory, parts, *, tied=False):
    """Write shards of a model and their index, as transformers does."""
    directory.mkdir()
    where = {}
    for at, part in enumerate(parts, 1):
        file = f"pytorch_model-{at:05d}-of-{len(parts):05d}.bin"
        torch.save(part, directory / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "training_args.bin").write_bytes(b"whatever")
    return sorted(directory.glob("pytorch_model-*.bin"))


def halves():
    items = list(weights().items())
    return dict(items[:2]), dict(items[2:])


def check(source, expected):
    assert source.names() == sorted(f"model/{name}" for name in expected)
    for name, tensor in expected.items():
        raw = bytearray(tensor.nelement() * tensor.element_size())
        source.read_box(f"model/{name}", (0, 0), tensor.shape, raw)
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_shards_are_read_as_one_model(tmp_path):
    first, second = halves()
    second[HEAD] = second["model.layers.1.w"]  # shares its storage
    shard(tmp_path / "hf", [first, second])
    with open_source(tmp_path / "hf") as source:
        assert source.format == "huggingface-bin"
        assert source.state["model_config"]["model_type"] == "llama"
        assert source.aliases == {"model/model.layers.1.w": f"model/{HEAD}"}
        assert "training_args.bin" in {each.name for each in source.ignored}
        check(source, first | second)


def test_one_file_and_a_head_that_the_config_ties(tmp_path):
    directory = tmp_path / "hf"
    shard(directory, [weights()], tied=True)[0].rename(directory / "pytorch_model.bin")
    with open_source(directory) as source:
        assert source.aliases == {f"model/{HEAD}": f"model/{EMBED}"}
        check(source, weights() | {HEAD: weights()[EMBED]})


def lie(directory, change):
    path = directory / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def last(directory):
    return max(directory.glob("pytorch_model-*.bin"))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda d: last(d).unlink(), "E_MISSING_FILE"),
        (lambda d: lie(d, lambda m: m.popitem()), "E_INDEX"),
        (lambda d: lie(d, lambda m: m.update(x=m[EMBED])), "E_INDEX"),
        (lambda d: lie(d, lambda m: m.update(x="../x.bin")), "E_PATH"),
        (lambda d: os.truncate(last(d), 70), "E_ARCHIVE"),
        (lambda d: last(d).write_bytes(min(d.glob("*-*.bin")).read_bytes()), "E_INDEX"),
        (lambda d: torch.save({"a": {"b": torch.ones(2)}}, last(d)), "E_INDEX"),
        (lambda d: torch.save({"a": os.system}, last(d)), "E_PICKLE"),
        (lambda d: last(d).write_bytes(pickle.dumps({})), "E_ARCHIVE"),
    ],
    ids=range(9),
)
def test_shards_that_are_missing_damaged_or_hostile_are_refused(tmp_path, spoil, code):
    shard(tmp_path / "hf", halves())
    spoil(tmp_path / "hf")
    with pytest.raises((IntegrityError, ConfigError)) as refused:
        open_source(tmp_path / "hf")
    assert refused.value.code == code


def test_a_flipped_byte_is_caught(tmp_path):
    path = shard(tmp_path / "hf", halves())[1]
    raw = bytearray(path.read_bytes())
    raw[
        raw.index(weights()["model.norm.weight"].view(torch.uint8).numpy().tobytes())
    ] ^= 1
    path.write_bytes(raw)
    with open_source(tmp_path / "hf") as source, pytest.raises(IntegrityError):
        check(source, weights())
