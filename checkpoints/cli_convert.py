"""The verbs that write: convert, reshard, consolidate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
from cyclopts import Parameter

from checkpoints.cli_output import progress, show, show_json, size_text
from checkpoints.conversion import convert as run_conversion
from checkpoints.conversion_plan import MAX_MEMORY_BYTES, ConvertOptions
from checkpoints.conversion_report import ConversionReport
from checkpoints.cuts import Cut
from checkpoints.formats.registry import formats_written
from checkpoints.formats.sink import MAX_SHARD_BYTES
from checkpoints.tensor_parallel import tensor_parallel_dims
from fabric.core.errors import ConfigError

_SIZE = re.compile(r"([0-9]+)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    map: Annotated[list[str] | None, Parameter(negative="")] = None,
    form: str = "",
    config: Path | None = None,
    dtype: str = "",
    max_shard_size: str = f"{MAX_SHARD_BYTES >> 30}GiB",
    step: int | None = None,
    from_format: str = "",
    root: str = "",
    workers: int = 0,
    max_memory: str = f"{MAX_MEMORY_BYTES >> 20}MiB",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Convert a checkpoint, then read the result again and compare every tensor.

    A run that was cut off goes on when the same command is given again.

    Args:
        source: File or directory of any format that is read.
        target: New directory or file; a directory of steps (canonical).
        to: Format to write.
        map: Name map to apply, or a .toml file of your own; may be repeated.
        form: Form of the names wanted, such as megatron or huggingface; finds the maps
            by the config's model_type.
        config: config.json of the model, for a source that has none.
        dtype: Cast the model's floats to F64, F32, F16 or BF16; never by itself.
        max_shard_size: Tensor bytes per file, such as 5GiB.
        step: Number of the step to save as; default: the source's.
        from_format: Format of the source, if it is not found out.
        root: Root id that a canonical source must have.
        workers: Files written at the same time; 0: one for each core.
        max_memory: Bytes of all buffers, such as 64MiB.
        dry_run: Say what would be done, and write nothing.
        json: Print the report of every tensor as one JSON object.
    """
    options = ConvertOptions(
        to=to,
        maps=tuple(map or ()),
        form=form,
        config=config,
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size),
        step=step,
        from_format=from_format,
        root=root,
        workers=workers,
        max_memory=parse_size(max_memory),
        dry_run=dry_run,
    )
    _convert("convert", source, target, options, json=json)


def reshard(
    source: Path,
    target: Path,
    *,
    world: int,
    layout: Literal["fsdp", "tp"] = "fsdp",
    to: str = "canonical",
    step: int | None = None,
    from_format: str = "",
    root: str = "",
    workers: int = 0,
    max_memory: str = f"{MAX_MEMORY_BYTES >> 20}MiB",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Write the same tensors cut for another number of ranks, one set of files each.

    A canonical checkpoint loads on any layout as it is; this only brings together what
    each rank of one layout reads.

    Args:
        source: File or directory of any format that is read.
        target: A directory of steps.
        world: Number of ranks.
        layout: fsdp: rows; tp: rows or columns by the tensor's name.
        to: Format to write.
        step: Number of the step to save as; default: the source's.
        from_format: Format of the source, if it is not found out.
        root: Root id that a canonical source must have.
        workers: Files written at the same time; 0: one for each core.
        max_memory: Bytes of all buffers, such as 64MiB.
        dry_run: Say what would be done, and write nothing.
        json: Print the report of every tensor as one JSON object.
    """
    dims = tensor_parallel_dims() if layout == "tp" else ()
    options = ConvertOptions(
        to=to,
        cut=Cut(layout, world, dims),
        step=step,
        from_format=from_format,
        root=root,
        workers=workers,
        max_memory=parse_size(max_memory),
        dry_run=dry_run,
    )
    _convert("reshard", source, target, options, json=json)


def consolidate(
    source: Path,
    target: Path,
    *,
    from_format: str = "",
    root: str = "",
    max_memory: str = f"{MAX_MEMORY_BYTES >> 20}MiB",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Write everything into one file.

    Args:
        source: File or directory of any format that is read.
        target: New file, named .safetensors or .pt.
        from_format: Format of the source, if it is not found out.
        root: Root id that a canonical source must have.
        max_memory: Bytes of all buffers, such as 64MiB.
        dry_run: Say what would be done, and write nothing.
        json: Print the report of every tensor as one JSON object.
    """
    kinds = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}
    to = kinds.get(target.suffix, "")
    if to not in formats_written():
        raise ConfigError(
            f"{target.name} has no suffix of a format of one file",
            code="E_FORMAT",
            next_step="name it .safetensors or .pt",
        )
    options = ConvertOptions(
        to=to,
        from_format=from_format,
        root=root,
        max_memory=parse_size(max_memory),
        dry_run=dry_run,
    )
    _convert("consolidate", source, target, options, json=json)


def parse_size(text: str) -> int:
    """Return a number of bytes from words such as "64MiB", "5G" or "1000".

    Raises:
        ConfigError: it is none, or 0.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        unit = (match.group(2) or "")[:1].lower()
        size = int(match.group(1)) * _UNITS[unit]
    if not size:
        raise ConfigError(
            f"{text!r} is no size", code="E_USAGE", next_step="such as 64MiB or 5GiB"
        )
    return size


def _convert(
    verb: str, source: Path, target: Path, options: ConvertOptions, *, json: bool
) -> None:
    with progress(verb) as on_progress:
        report = run_conversion(source, target, options, on_progress=on_progress)
    if json:
        show_json(report)
    else:
        _show(report)


def _show(report: ConversionReport) -> None:
    for name in report.maps:
        show(f"map: {name}")
    for outcome in report.tensors:
        if outcome.action == "ignored":
            show(f"ignored: {outcome.source}: {outcome.reason}")
        elif outcome.action == "tied":
            show(f"tied: {outcome.source} is stored as {outcome.targets[0]}")
    for each in report.ignored:
        show(f"ignored: {each.name}: {each.reason}")
    for note in report.notes:
        show(f"note: {note}")
    size = sum(each.size_bytes for each in report.written)
    what = f"{len(report.written)} tensors, {size_text(size)}"
    if report.dry_run:
        for file in report.files:
            words = f"{file.tensors} tensors, {size_text(file.size_bytes)}"
            show(f"would write: {file.path}  {words}")
        show(f"dry run: {what} to {report.target}; nothing was written")
        return
    if report.resumed_files:
        show(f"resumed: {report.resumed_files} files of an earlier run were kept")
    root = f", root {report.root}" if report.root else ""
    show(f"ok: {what} to {report.target}; read again and equal to the source{root}")


def add_to(app: cyclopts.App) -> None:
    """Add these verbs to ``app``."""
    for verb in (convert, reshard, consolidate):
        app.command(verb)
