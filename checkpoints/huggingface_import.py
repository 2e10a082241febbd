"""Import a Hugging Face directory of safetensors as a canonical checkpoint.

The inverse of ``checkpoints.huggingface``: tensors go under ``model/``, config.json to
``state["model_config"]``. Ends by reading the step again and comparing each tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec

from checkpoints.boxes import whole
from checkpoints.conversion import ConversionReport, HashingMeter, TensorOutcome
from checkpoints.directories import disk_errors
from checkpoints.dtypes import tensor_bytes
from checkpoints.huggingface import (
    CONFIG_NAME,
    GENERATION_CONFIG_KEY,
    GENERATION_CONFIG_NAME,
    INDEX_NAME,
    MODEL_CONFIG_KEY,
    MODEL_PREFIX,
    SINGLE_NAME,
)
from checkpoints.llama import EMBEDDING, HEAD
from checkpoints.manifest import Json
from checkpoints.manifest_checks import check_file_name
from checkpoints.parts import ChunkSource
from checkpoints.progress import Progress, no_progress
from checkpoints.reader import CheckpointReader
from checkpoints.safetensors_file import SafetensorsFile
from checkpoints.writer import CheckpointWriter
from fabric.core.errors import ConfigError, IntegrityError

MAX_JSON_BYTES = 32 << 20
"""Largest config or index read."""


class _Index(msgspec.Struct):
    """model.safetensors.index.json; its metadata is not needed."""

    weight_map: dict[str, str]


def import_huggingface(
    source: Path,
    target: Path,
    *,
    step: int = 0,
    on_progress: Progress = no_progress,
) -> ConversionReport:
    """Save the model in ``source`` as step ``step`` of directory ``target``.

    Args:
        source: Holds config.json and model.safetensors, or an index and its shards.
        target: Directory of checkpoints; made if missing.
        step: Must not exist in it.
        on_progress: Counts bytes written, then bytes read again.

    Raises:
        ConfigError: no safetensors model there, or the step exists.
        IntegrityError: a file is damaged or not as the index says, or the step differs
            when read again.
        ResourceExhausted: the disk is full. No step is left.
    """
    report = ConversionReport(source=str(source), target="", to="canonical")
    with disk_errors(source), ExitStack() as stack:
        files = {
            name: stack.enter_context(SafetensorsFile(source / name))
            for name in _weight_files(source)
        }
        _check_index(source, files)
        state, aliases = _state(source, files, report)
        _save(files, target, step, state, aliases, report, on_progress)
        used = {*files, CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME}
        report.skipped = sorted(
            f"{each.name}: not part of a checkpoint"
            for each in source.iterdir()
            if each.name not in used
        )
    return report


def _weight_files(source: Path) -> list[str]:
    if (source / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    if not (source / INDEX_NAME).is_file():
        raise ConfigError(
            f"neither {SINGLE_NAME} nor {INDEX_NAME} in {source}",
            code="E_NOT_FOUND",
            next_step="only safetensors are read; .bin files hold pickles",
        )
    names = sorted(set(_read_index_untrusted(source).values()))
    for name in names:
        check_file_name(name)
    return names


def _check_index(source: Path, files: Mapping[str, SafetensorsFile]) -> None:
    """Pass if the files hold just the tensors that the index places in them."""
    found = {name: file for file, each in files.items() for name in each.header.tensors}
    count = sum(len(each.header.tensors) for each in files.values())
    if count != len(found):
        raise IntegrityError(f"{source}: a tensor in two files", code="E_INDEX")
    if SINGLE_NAME in files:
        return
    wrong = set(found.items()) ^ set(_read_index_untrusted(source).items())
    if wrong:
        names = sorted({name for name, _ in wrong})
        raise IntegrityError(
            f"{source}: index and files differ about {len(names)} tensors: "
            f"{', '.join(names)[:300]}",
            code="E_INDEX",
            next_step="fetch the model again",
        )


def _state(
    source: Path, files: Mapping[str, SafetensorsFile], report: ConversionReport
) -> tuple[dict[str, Json], dict[str, str]]:
    """Return the step's state and aliases."""
    config = _read_json_untrusted(source / CONFIG_NAME)
    state: dict[str, Json] = {MODEL_CONFIG_KEY: config}
    if (source / GENERATION_CONFIG_NAME).is_file():
        generation = _read_json_untrusted(source / GENERATION_CONFIG_NAME)
        state[GENERATION_CONFIG_KEY] = generation
    names = {name for each in files.values() for name in each.header.tensors}
    tied = config.get("tie_word_embeddings") is True
    if tied and HEAD not in names and EMBEDDING in names:
        report.notes.append(f"{HEAD} is tied to {EMBEDDING}: recorded as an alias")
        return state, {MODEL_PREFIX + HEAD: MODEL_PREFIX + EMBEDDING}
    return state, {}


def _save(
    files: Mapping[str, SafetensorsFile],
    target: Path,
    step: int,
    state: Mapping[str, Json],
    aliases: Mapping[str, str],
    report: ConversionReport,
    on_progress: Progress,
) -> None:
    total = sum(
        tensor_bytes(entry.dtype, entry.shape)
        for each in files.values()
        for entry in each.header.tensors.values()
    )
    meter = HashingMeter(2 * total, on_progress)
    sources = [
        ChunkSource(
            MODEL_PREFIX + name,
            entry.dtype,
            entry.shape,
            whole(entry.shape),
            meter.tee(MODEL_PREFIX + name, partial(each.windows, name)),
        )
        for each in files.values()
        for name, entry in each.header.tensors.items()
    ]
    with CheckpointWriter(target, step) as writer:
        part = writer.write("import", sources)
        report.root = writer.commit([part], state=state, aliases=aliases)
    report.target = str(writer.path)
    report.copied_bytes = total
    report.files = sorted(part.files)
    with CheckpointReader(writer.path, root=report.root) as reader:
        report.tensors = [_verify(reader, each, meter) for each in _by_name(sources)]
    report.verified = True


def _by_name(sources: Sequence[ChunkSource]) -> list[ChunkSource]:
    return sorted(sources, key=lambda source: source.name)


def _verify(
    reader: CheckpointReader, source: ChunkSource, meter: HashingMeter
) -> TensorOutcome:
    meter.check(source.name, reader.windows(source.name))
    chunks = reader.entry(source.name).chunks
    return TensorOutcome(
        source=source.name.removeprefix(MODEL_PREFIX),
        action="copied",
        target=source.name,
        file=chunks[0].file if chunks else "",
        size_bytes=source.size,
        blake3=meter.hashes[source.name],
    )


def _read_index_untrusted(source: Path) -> dict[str, str]:
    try:
        index = msgspec.convert(_read_json_untrusted(source / INDEX_NAME), _Index)
    except msgspec.MsgspecError as exc:
        raise _bad(source / INDEX_NAME, exc) from exc
    return index.weight_map


def _read_json_untrusted(path: Path) -> dict[str, Json]:
    """Return the JSON object in a file.

    Raises:
        IntegrityError: too large, or not a JSON object.
    """
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} B")
        value = json.loads(text.decode())
        if not isinstance(value, dict):
            raise ValueError("not an object")  # noqa: TRY004  (bytes, not our type)
    except (ValueError, RecursionError) as exc:
        raise _bad(path, exc) from exc
    return value


def _bad(path: Path, cause: Exception) -> IntegrityError:
    return IntegrityError(
        f"{path}: {str(cause)[:200]}",
        code="E_JSON",
        next_step="the file is damaged: fetch the model again",
    )
