from __future__ import annotations

import pytest

from fabric.core.errors import ConfigError
from fabric.jobs.spec import CODEC, JobSpec, check_spec, job_id, load_spec, spec_of

GOLDEN_ID = "54ae575f4382c8c62c1b420e42055ff1ef0522fa801ef3d2ec7fd221b6b38932"
GOLDEN_SPEC = JobSpec(name="golden", submitter="12D3KooWx", nonce="00ff")


def write(tmp_path, text):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_default_spec(tmp_path):
    assert load_spec(write(tmp_path, "")) == JobSpec()


def test_sections_and_overrides(tmp_path):
    path = write(tmp_path, "[train]\nseed = 3\n[train.outer]\nrounds = 7\n")
    spec = load_spec(
        path, {"train.outer.rounds": 5, "name": "n", "train.learning_rate": "1e-3"}
    )
    assert (spec.train.seed, spec.train.outer.rounds) == (3, 5)
    assert (spec.name, spec.train.learning_rate) == ("n", 1e-3)


@pytest.mark.parametrize(
    ("text", "reason", "next_step"),
    [
        ("[train.outer]\nround = 3", "train.outer.round", "train.outer.rounds"),
        ("[fault]\npatience = 3", "fault.patience", "fault.patience_seconds"),
        ("trian = 1", "trian", "train"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(tmp_path, text, reason, next_step):
    with pytest.raises(ConfigError) as caught:
        load_spec(write(tmp_path, text))
    assert reason in caught.value.reason
    assert next_step in caught.value.next_step
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "[train.outer]\nrounds = 0",
        '[train.outer]\nrounds = "many"',
        "train = 3",
        "not toml",
        "[model]\nhidden_size = 100\nnum_heads = 3",
        "[model]\nnum_heads = 4\nnum_kv_heads = 3",
        "[require]\nmin_peers = 5\nmax_peers = 4",
        'kind = "serve"',
    ],
)
def test_impossible_values_and_combinations_are_refused(tmp_path, text):
    with pytest.raises(ConfigError):
        load_spec(write(tmp_path, text))


@pytest.mark.parametrize(
    "overrides",
    [{"train.outer.rounds": "x y"}, {"name.x": 1}, {"train.outer.nope": 1}],
)
def test_bad_overrides_are_refused(tmp_path, overrides):
    with pytest.raises(ConfigError):
        load_spec(write(tmp_path, 'name = "n"'), overrides)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.toml"):
        load_spec(tmp_path / "nope.toml")


def test_a_spec_above_a_slot_value_is_refused():
    spec = spec_of({"name": "n", "model": {"source": "s" * 1000}}, "test")
    check_spec(spec)
    long = {"source": "\u20ac" * 1000}
    with pytest.raises(ConfigError, match="4096"):
        spec_of({"model": long, "data": long}, "test")


def test_the_encoding_is_the_id_and_does_not_change_by_accident():
    assert CODEC.decode_untrusted(CODEC.encode(GOLDEN_SPEC)) == GOLDEN_SPEC
    assert job_id(GOLDEN_SPEC) == GOLDEN_ID
