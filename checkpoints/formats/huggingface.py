"""A model as transformers stores it: config.json and files of safetensors.

Tensors are ``model/<name>``; ``state["model_config"]`` is config.json. Tied weights: a
head that the config ties and the files lack is an alias; when written, it is left out
if the config ties it and its bytes are the embedding's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from checkpoints.directories import sync_directory, write_synced
from checkpoints.formats.extent_source import ExtentSource, StoredTensor
from checkpoints.formats.shard_files import (
    cut_shards,
    plan_file,
    read_file_untrusted,
    shard_names,
)
from checkpoints.formats.sink import Bundle, OutTensor, Plan, SinkOptions
from checkpoints.formats.source import MODEL, OPTIMIZER, Ignored, Source
from checkpoints.hashed_file import hash_windows
from checkpoints.manifest import FileEntry, Json
from checkpoints.manifest_checks import check_file_name
from checkpoints.model_config import MODEL_CONFIG_KEY, read_json_untrusted
from checkpoints.model_tensors import expected_tensors, family_of, ties_embeddings
from fabric.core.errors import ConfigError, IntegrityError

GENERATION_CONFIG_KEY = "generation_config"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
STEM = "model"
SINGLE_NAME = f"{STEM}.safetensors"
INDEX_NAME = f"{STEM}.safetensors.index.json"
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""What a config ties in families that are not known here."""


class _Index(msgspec.Struct):
    """model.safetensors.index.json; its metadata is not needed."""

    weight_map: dict[str, str]


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a directory with a model of safetensors."""
    return any((path / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def open_source(path: Path) -> Source:
    """Open a model's directory.

    Raises:
        ConfigError: no safetensors model there.
        IntegrityError: a file is damaged or missing, or not as the index says.
    """
    if not sniff(path):
        raise ConfigError(
            f"neither {SINGLE_NAME} nor {INDEX_NAME} in {path}",
            code="E_NOT_FOUND",
            next_step="files of torch.save (.bin) are read as huggingface-bin",
        )
    index = {}
    if not (path / SINGLE_NAME).is_file():
        index = read_index_untrusted(path, INDEX_NAME)
    names = sorted(set(index.values())) or [SINGLE_NAME]
    for name in names:
        check_file_name(name)
    found: dict[str, StoredTensor] = {}
    where: dict[str, str] = {}
    for name in names:
        for key, tensor in read_file_untrusted(path, name).tensors.items():
            if key in found:
                raise index_fault(path, f"{key!r} in two files")
            found[key] = tensor
            where[key] = name
    check_index(path, index, where)
    state = model_state(path)
    return ExtentSource(
        "huggingface",
        path,
        path,
        {MODEL + key: tensor for key, tensor in found.items()},
        aliases=tied_aliases(state.get(MODEL_CONFIG_KEY, {}), found),
        state=state,
        ignored=other_files(path, {*names, INDEX_NAME}),
    )


def other_files(path: Path, used: Collection[str]) -> list[Ignored]:
    """Return what lies in a model's directory beside ``used`` and its configs."""
    known = {*used, CONFIG_NAME, GENERATION_CONFIG_NAME}
    return [
        Ignored(each.name, "not part of a checkpoint")
        for each in sorted(path.iterdir())
        if each.name not in known and not each.name.startswith(".")
    ]


def tied_aliases(config: Mapping[str, Json], found: Collection[str]) -> dict[str, str]:
    """Return the heads that the config ties and the files lack, and whose they are."""
    if not ties_embeddings(config):
        return {}
    return {
        MODEL + head: MODEL + embedding
        for head, embedding in _tied(config).items()
        if head not in found and embedding in found
    }


def _tied(config: Mapping[str, Json]) -> Mapping[str, str]:
    family = family_of(config)
    return family.tied if family else TIED


def model_state(path: Path) -> dict[str, Json]:
    """Return the configs beside a model's files."""
    state = {}
    for key, name in (
        (MODEL_CONFIG_KEY, CONFIG_NAME),
        (GENERATION_CONFIG_KEY, GENERATION_CONFIG_NAME),
    ):
        if (path / name).is_file():
            state[key] = read_json_untrusted(path / name)
    return state


def read_index_untrusted(path: Path, name: str) -> dict[str, str]:
    """Return the file of each tensor, as an index says.

    Raises:
        IntegrityError: it is damaged.
    """
    found = read_json_untrusted(path / name)
    try:
        return msgspec.convert(found, _Index).weight_map
    except msgspec.MsgspecError as exc:
        raise index_fault(path, str(exc), "E_JSON") from exc


def check_index(path: Path, index: Mapping[str, str], where: Mapping[str, str]) -> None:
    """Refuse an index, if there is one, that says otherwise than the files."""
    if index and index != where:
        wrong = sorted({key for key, _ in set(index.items()) ^ set(where.items())})
        raise index_fault(
            path, f"index and files differ about {len(wrong)}: {', '.join(wrong)[:300]}"
        )


def index_fault(path: Path, reason: str, code: str = "E_INDEX") -> IntegrityError:
    """Return the error of a model whose files are not as they should be."""
    return IntegrityError(
        f"{path}: {reason}", code=code, next_step="fetch the model again"
    )


class HuggingFaceSink:
    """Writes a directory that ``from_pretrained`` loads."""

    format = "huggingface"

    def plan(self, bundle: Bundle, options: SinkOptions) -> Plan:
        """Return the files; reads weights only to prove that tied ones are equal.

        Raises:
            ConfigError: no model or no config (``E_NO_MODEL``, ``E_MODEL_CONFIG``);
                names or shapes are not those of the config (``E_MODEL_TENSORS``); the
                config ties weights that differ (``E_TIED_DIFFER``).
        """
        config, notes = _config(bundle)
        tensors, ignored = _selected(bundle)
        tied = _left_out(bundle, config, tensors)
        for name in tied:
            del tensors[name]
        notes += _check_tensors(config, tensors, tied)
        sizes = {name: tensor.size_bytes for name, tensor in tensors.items()}
        groups = cut_shards(sizes, options.max_shard_bytes)
        names = shard_names(groups, STEM)
        files = [
            plan_file(
                file,
                {key: tensors[key] for key in group},
                {"format": "pt"},
                MODEL.__add__,
            )
            for file, group in zip(names, groups, strict=True)
        ]
        where = {
            key: file
            for file, group in zip(names, groups, strict=True)
            for key in group
        }
        texts = {CONFIG_NAME: config}
        generation = bundle.state.get(GENERATION_CONFIG_KEY)
        if isinstance(generation, dict):
            texts[GENERATION_CONFIG_NAME] = generation
        if len(files) > 1:
            total = {"total_size": sum(sizes.values())}
            texts[INDEX_NAME] = {"metadata": total, "weight_map": where}
        return Plan(
            files=files,
            finish=partial(_finish, texts),
            ignored=ignored,
            tied={MODEL + head: MODEL + kept for head, kept in tied.items()},
            notes=notes,
            rewritten=[MODEL_CONFIG_KEY],
        )


SINK = HuggingFaceSink()


def _config(bundle: Bundle) -> tuple[dict[str, Json], list[str]]:
    found = bundle.state.get(MODEL_CONFIG_KEY)
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ConfigError(
            f"the state has no {MODEL_CONFIG_KEY!r} with a model_type",
            code="E_MODEL_CONFIG",
            next_step="name the model's config.json with --config, or save it there",
        )
    config = dict(found)
    family = family_of(config)
    if config.get("architectures") or family is None:
        return config, []
    architecture = family.architectures[config["model_type"]]
    config["architectures"] = [architecture]
    return config, [f"architectures set to {architecture}"]


class _Selected(NamedTuple):
    tensors: dict[str, OutTensor]
    ignored: list[Ignored]


def _selected(bundle: Bundle) -> _Selected:
    """Return the model's tensors by their names in it, and what is left out."""
    tensors: dict[str, OutTensor] = {}
    ignored: list[Ignored] = []
    stored = {name: name for name in bundle.tensors} | dict(bundle.aliases)
    for name, target in stored.items():
        if name.startswith(MODEL):
            tensors[name.removeprefix(MODEL)] = bundle.tensors[target]
        else:
            what = "optimizer state" if name.startswith((OPTIMIZER, "outer/")) else "it"
            reason = f"{what} has no place in a Hugging Face model"
            ignored.append(Ignored(name, reason))
    if not tensors:
        raise ConfigError(f"no tensor under {MODEL}", code="E_NO_MODEL")
    kept = {MODEL_CONFIG_KEY, GENERATION_CONFIG_KEY}
    ignored += [
        Ignored(f"state.{key}", "no place in a Hugging Face model")
        for key in sorted(bundle.state.keys() - kept)
    ]
    return _Selected(tensors, ignored)


def _left_out(
    bundle: Bundle, config: Mapping[str, Json], tensors: Mapping[str, OutTensor]
) -> dict[str, str]:
    """Return heads that the config ties, after making sure that they are the same."""
    if not ties_embeddings(config):
        return {}
    tied = {head: kept for head, kept in _tied(config).items() if head in tensors}
    for head, kept in tied.items():
        if kept not in tensors:
            raise ConfigError(
                f"the config ties {head} to a missing {kept}", code="E_MODEL_TENSORS"
            )
        one, other = tensors[head], tensors[kept]
        if one is not other and not (
            (one.dtype, one.shape) == (other.dtype, other.shape)
            and hash_windows(one.read()) == hash_windows(other.read())
        ):
            raise ConfigError(
                f"the config ties {head} and {kept}, but they differ",
                code="E_TIED_DIFFER",
                next_step="set tie_word_embeddings to false in model_config",
            )
    return tied


def _check_tensors(
    config: Mapping[str, Json],
    tensors: Mapping[str, OutTensor],
    tied: Mapping[str, str],
) -> list[str]:
    """Refuse a model that transformers would complete with random weights."""
    family = family_of(config)
    if family is None:
        return [
            f"names were not compared with the config: model_type "
            f"{config['model_type']!r} is not known here"
        ]
    expected = expected_tensors(config)
    may_lack = set(tied)
    if ties_embeddings(config):
        may_lack |= family.tied.keys() - tensors.keys()
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wanted = {name: shape for name, shape in expected.items() if name not in may_lack}
    wrong = sorted({name for name, _ in set(wanted.items()) ^ set(found.items())})
    if wrong:
        raise ConfigError(
            f"{len(wrong)} tensors are missing, unknown or of another shape: "
            f"{', '.join(wrong)[:300]}",
            code="E_MODEL_TENSORS",
            next_step="the checkpoint does not hold the model of its config, or under "
            "other names: `fabric-ckpt maps` lists the name maps",
        )
    return []


def _finish(
    texts: Mapping[str, Mapping[str, Json]],
    directory: Path,
    entries: Mapping[str, FileEntry],
) -> None:
    del entries
    for name, value in texts.items():
        text = json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"
        write_synced(directory / name, text)
    sync_directory(directory)
