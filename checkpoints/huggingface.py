"""Export a canonical checkpoint to a directory that ``from_pretrained`` loads.

Tensors under ``model/`` are exported, the prefix removed; everything else is named in
the report with the reason it was left. ``state["model_config"]`` becomes config.json.
Tied weights: the head is left out if the config ties it and its bytes are the
embedding's; a config that does not tie gets two copies.

The directory is written beside the target, read again, compared with the source tensor
by tensor, and only then renamed into place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from checkpoints.conversion import ConversionReport, HashingMeter, TensorOutcome
from checkpoints.directories import disk_errors, sync_directory, write_synced
from checkpoints.dtypes import tensor_bytes
from checkpoints.llama import EMBEDDING, HEAD, expected_tensors
from checkpoints.manifest import Json
from checkpoints.progress import Progress, no_progress
from checkpoints.reader import CheckpointReader
from checkpoints.safetensors_file import (
    SafetensorsFile,
    TensorStream,
    hash_windows,
    write_safetensors,
)
from checkpoints.safetensors_io import HeaderEntry, NewTensor
from fabric.core.errors import ConfigError, IntegrityError

MODEL_PREFIX = "model/"
MODEL_CONFIG_KEY = "model_config"
GENERATION_CONFIG_KEY = "generation_config"
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30
"""What transformers' save_pretrained cuts at, in round numbers."""

_REASONS = {
    "outer": "outer optimizer state has no place in a Hugging Face model",
    "optimizer": "optimizer state has no place in a Hugging Face model",
}


def export_huggingface(
    source: Path,
    target: Path,
    *,
    root: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Progress = no_progress,
) -> ConversionReport:
    """Write the model of ``source`` to the new directory ``target``.

    Args:
        source: A canonical step, or the directory whose ``latest`` names one.
        target: Must not exist, or be empty.
        root: Root id that the source must have, or empty.
        max_shard_bytes: Tensor bytes per file; a larger tensor gets a file of its own.
        on_progress: Counts bytes written, then bytes read again.

    Raises:
        ConfigError: the target exists; no model or no config in the source; names or
            shapes are not those of the config; the config ties weights that differ.
        IntegrityError: a block of the source is damaged, or the target differs when
            read again.
        ResourceExhausted: the disk is full. No target is left.
    """
    with CheckpointReader(source, root=root) as reader:
        report = ConversionReport(
            source=str(reader.path),
            target=str(target),
            to="huggingface",
            root=reader.root,
        )
        config = _model_config(reader, report)
        names = _select(reader, config, report)
        _check_names(reader, config, names, report)
        with _new_directory(target) as directory:
            _write_model(reader, names, directory, max_shard_bytes, report, on_progress)
            _write_configs(reader, config, directory, report)
    report.tensors.sort(key=lambda outcome: outcome.source)
    return report


def _model_config(
    reader: CheckpointReader, report: ConversionReport
) -> dict[str, Json]:
    config = reader.manifest.state.get(MODEL_CONFIG_KEY)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(
            f"{reader.path}: state has no {MODEL_CONFIG_KEY!r} with a model_type",
            code="E_MODEL_CONFIG",
            next_step="save the model's config.json under that key",
        )
    config = dict(config)
    if not config.get("architectures") and config["model_type"] == "llama":
        config["architectures"] = ["LlamaForCausalLM"]
        report.notes.append("architectures set to LlamaForCausalLM")
    return config


def _select(
    reader: CheckpointReader, config: Mapping[str, Json], report: ConversionReport
) -> dict[str, str]:
    """Return target name -> source name, and report what is left out."""
    names: dict[str, str] = {}
    for name in reader.names():
        if name.startswith(MODEL_PREFIX):
            names[name.removeprefix(MODEL_PREFIX)] = name
        else:
            section = name.partition("/")[0]
            reason = _REASONS.get(section, f"not under {MODEL_PREFIX}")
            report.tensors.append(
                TensorOutcome(source=name, action="not_exported", reason=reason)
            )
    if not names:
        raise ConfigError(
            f"{reader.path}: no tensor under {MODEL_PREFIX}", code="E_NO_MODEL"
        )
    if config.get("tie_word_embeddings") is True and HEAD in names:
        _drop_tied_head(reader, names, report)
    for key in sorted(reader.manifest.state):
        if key not in {MODEL_CONFIG_KEY, GENERATION_CONFIG_KEY}:
            report.skipped.append(f"state.{key}: no place in a Hugging Face model")
    return names


def _drop_tied_head(
    reader: CheckpointReader, names: dict[str, str], report: ConversionReport
) -> None:
    """Leave the head to the embedding, after making sure that they are the same."""
    head = names[HEAD]
    embedding = names.get(EMBEDDING)
    target = reader.manifest.aliases.get(head, head)
    if embedding is None:
        raise ConfigError(f"the config ties {HEAD} to a missing {EMBEDDING}")
    aliased = target == reader.manifest.aliases.get(embedding, embedding)
    if not aliased and not (
        reader.entry(head).shape == reader.entry(embedding).shape
        and reader.entry(head).dtype == reader.entry(embedding).dtype
        and hash_windows(reader.windows(head))
        == hash_windows(reader.windows(embedding))
    ):
        raise ConfigError(
            f"the config ties {HEAD} and {EMBEDDING}, but they differ",
            code="E_TIED_DIFFER",
            next_step="set tie_word_embeddings to false in model_config",
        )
    del names[HEAD]
    report.tensors.append(TensorOutcome(source=head, action="tied", target=EMBEDDING))


def _check_names(
    reader: CheckpointReader,
    config: Mapping[str, Json],
    names: Mapping[str, str],
    report: ConversionReport,
) -> None:
    """Refuse a model that transformers would complete with random weights."""
    if config["model_type"] != "llama":
        report.notes.append(
            f"names were not compared with the config: model_type "
            f"{config['model_type']!r} is not known here"
        )
        return
    expected = expected_tensors(config)
    if HEAD not in names and config.get("tie_word_embeddings") is True:
        del expected[HEAD]
    found = {name: reader.entry(source).shape for name, source in names.items()}
    wrong = sorted(set(expected.items()) ^ set(found.items()))
    if wrong:
        raise ConfigError(
            f"{len({name for name, _ in wrong})} tensors are missing, unknown or of "
            f"another shape: {', '.join(dict(wrong))[:300]}",
            code="E_MODEL_TENSORS",
            next_step="the checkpoint does not hold the model of its model_config",
        )


def _write_model(
    reader: CheckpointReader,
    names: Mapping[str, str],
    directory: Path,
    max_shard_bytes: int,
    report: ConversionReport,
    on_progress: Progress,
) -> None:
    """Write the files, read them again, and report each tensor."""
    sizes = {
        name: tensor_bytes(reader.entry(source).dtype, reader.entry(source).shape)
        for name, source in names.items()
    }
    shards = _cut_shards(sizes, max_shard_bytes)
    total = sum(sizes.values())
    meter = HashingMeter(2 * total, on_progress)
    for file, members in shards.items():
        streams = [
            TensorStream(
                NewTensor(name, entry.dtype, entry.shape),
                meter.tee(name, partial(reader.windows, names[name])),
            )
            for name in members
            for entry in [reader.entry(names[name])]
        ]
        write_safetensors(directory / file, streams, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, each in shards.items() for name in each}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_synced(directory / INDEX_NAME, _pretty(index))
    for file, members in shards.items():
        _verify_file(reader, names, directory / file, members, meter)
        report.tensors += [
            TensorOutcome(
                source=names[name],
                action="copied",
                target=name,
                file=file,
                size_bytes=sizes[name],
                blake3=meter.hashes[name],
            )
            for name in members
        ]
    report.copied_bytes = total
    report.files += list(shards)
    report.verified = True


def _cut_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Return file name -> tensors, in name order, cut above ``max_bytes``."""
    groups: list[list[str]] = [[]]
    used = 0
    for name in sorted(sizes):
        if groups[-1] and used + sizes[name] > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += sizes[name]
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _verify_file(
    reader: CheckpointReader,
    names: Mapping[str, str],
    path: Path,
    members: list[str],
    meter: HashingMeter,
) -> None:
    """Pass if the file on the disk holds ``members`` as the source does."""
    with SafetensorsFile(path) as written:
        if written.header.tensors.keys() != set(members):
            raise IntegrityError(f"{path}: other tensors than written", code="E_VERIFY")
        for name in members:
            source = reader.entry(names[name])
            found: HeaderEntry = written.header.tensors[name]
            if (found.dtype, found.shape) != (source.dtype, source.shape):
                raise IntegrityError(f"{path}: {name!r} differs", code="E_VERIFY")
            meter.check(name, written.windows(name))


def _write_configs(
    reader: CheckpointReader,
    config: Mapping[str, Json],
    directory: Path,
    report: ConversionReport,
) -> None:
    write_synced(directory / CONFIG_NAME, _pretty(config))
    report.files.append(CONFIG_NAME)
    generation = reader.manifest.state.get(GENERATION_CONFIG_KEY)
    if isinstance(generation, dict):
        write_synced(directory / GENERATION_CONFIG_NAME, _pretty(generation))
        report.files.append(GENERATION_CONFIG_NAME)


def _pretty(value: Mapping[str, Json]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Give a directory that becomes ``target`` if the body succeeds, else vanishes."""
    directory = target.parent / f".{target.name}.{os.getpid()}.tmp"
    with disk_errors(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(
                f"{target} exists", code="E_EXISTS", next_step="name a new directory"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        try:
            yield directory
            sync_directory(directory)
            directory.rename(target)
            sync_directory(target.parent)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
