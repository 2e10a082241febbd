"""Load any layout from any layout: fill tensors in place with the bytes they need.

Names, shapes and element types must match what is stored. What may differ is asked for:
names that are missing or not wanted, names under another name, another element type.
Nothing is filled in, cut or cast otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from checkpoints.boxes import Box
from checkpoints.dtypes import tensor_bytes
from checkpoints.load_plan import Want, plan_load
from checkpoints.manifest import Json, TensorEntry
from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.exchange import (
    Exchange,
    LocalExchange,
    bodies,
    done,
    failed,
)
from checkpoints.torch_io.load_exchange import read_exchanged
from checkpoints.torch_io.pieces import Held, Value, survey
from checkpoints.torch_io.tensors import DTYPES
from checkpoints.torch_io.window_reads import WindowReads
from fabric.core.errors import ConfigError, FabricError

STAGE_BYTES = 64 << 20
"""A destination that cannot be read into is filled by pieces of about this size."""
BATCH_BYTES = 256 << 20
"""Bytes of such pieces in memory at a time."""


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What may differ between the checkpoint and the tensors to fill.

    Attributes:
        allow_missing: Tensors that the checkpoint does not have are left as they are.
        allow_unexpected: Stored tensors that are not asked for are left out.
        renames: Name of a tensor to fill -> the name under which it is stored.
        cast: Convert element types as ``Tensor.copy_`` does.
        threads: Readers; 0 = one per processor, at most four.
    """

    allow_missing: bool = False
    allow_unexpected: bool = False
    renames: Mapping[str, str] = {}
    cast: bool = False
    threads: int = 0


class Loaded(NamedTuple):
    """What was loaded.

    Attributes:
        root: Root of the checkpoint.
        step: Its step.
        state: Everything that is not a tensor.
        missing: Tensors that were not filled: not stored.
        unexpected: Stored tensors that no rank asked for.
    """

    root: str
    step: int
    state: Mapping[str, Json]
    missing: list[str]
    unexpected: list[str]


class Target(NamedTuple):
    """A box of a stored tensor, and the view that it fills."""

    entry: TensorEntry
    box: Box
    view: torch.Tensor


def load_into(
    path: Path,
    tensors: Mapping[str, Value],
    options: LoadOptions | None = None,
    *,
    root: str = "",
    exchange: Exchange | None = None,
) -> Loaded:
    """Fill ``tensors`` from a checkpoint, in place.

    Args:
        path: A step's directory, or the directory whose ``latest`` names one.
        tensors: What this rank holds, by canonical name.
        options: What may differ.
        root: Root that the checkpoint must have, or empty.
        exchange: Ranks that load together; all of them call. A stored tensor that one
            of them asks for is not unexpected, and each block is read by one of them.

    Raises:
        ConfigError: no checkpoint, or names (``E_MISSING``, ``E_UNEXPECTED``), shapes
            (``E_SHAPE``), types (``E_DTYPE``) differ; nothing is filled then.
        IntegrityError: a touched block is damaged; the tensors are then undefined.
    """
    options = options or LoadOptions()
    group = exchange or LocalExchange()
    with CheckpointReader(path, root=root) as reader:
        found: tuple[list[Target], list[str], list[str]] = ([], [], [])
        try:
            found = match(reader, tensors, options)
            outcome = done(msgspec.msgpack.encode(found[2]))
        except FabricError as exc:
            outcome = failed(exc)
        used = {
            name
            for body in bodies(group.all_gather(outcome))
            for name in msgspec.msgpack.decode(body, type=list[str])
        }
        targets, missing, _ = found
        unexpected = sorted(reader.manifest.tensors.keys() - used)
        if unexpected and not options.allow_unexpected:
            raise _refused("E_UNEXPECTED", "not asked for", unexpected)
        fill(reader, targets, options.threads, group)
        return Loaded(
            reader.root, reader.manifest.step, reader.state, missing, unexpected
        )


def match(
    reader: CheckpointReader, tensors: Mapping[str, Value], options: LoadOptions
) -> tuple[list[Target], list[str], list[str]]:
    """Return what to fill, the names that are not stored, the stored names used."""
    plan, held = survey(tensors)
    groups: dict[str, list[str]] = {name: [name] for name in held}
    for alias, first in plan.aliases.items():
        groups[first].append(alias)
    names = set(reader.names())
    targets: list[Target] = []
    missing: list[str] = []
    used: set[str] = set()
    for name, group in groups.items():
        sources = {options.renames.get(each, each) for each in group} & names
        real = {reader.aliases.get(each, each) for each in sources}
        if len(real) > 1:
            raise ConfigError(
                f"{group} share their elements here, but are stored as {sorted(real)}",
                code="E_TIED",
                next_step="ask for one of them only, or untie them",
            )
        if not real:
            missing += group
            continue
        entry = reader.entry(*real)
        check_match(name, held[name], entry, cast=options.cast)
        targets += [Target(entry, p.box, p.view) for p in held[name].pieces]
        used |= real
    if missing and not options.allow_missing:
        raise _refused("E_MISSING", "not stored", sorted(missing))
    return targets, sorted(missing), sorted(used)


def check_match(name: str, held: Held, entry: TensorEntry, *, cast: bool) -> None:
    """Pass if a stored tensor has the shape and type of the one to fill.

    Raises:
        ConfigError: it has not.
    """
    if entry.shape != held.shape:
        raise ConfigError(
            f"{name!r}: stored as {list(entry.shape)}, wanted {list(held.shape)}",
            code="E_SHAPE",
            next_step="build the model with the configuration that was saved",
        )
    if entry.dtype != held.dtype and not cast:
        raise ConfigError(
            f"{name!r}: stored as {entry.dtype}, wanted {held.dtype}",
            code="E_DTYPE",
            next_step="load with cast=True if a conversion is what you want",
        )


def fill(
    reader: CheckpointReader,
    targets: Sequence[Target],
    threads: int = 0,
    exchange: Exchange | None = None,
) -> None:
    """Read all targets; with an exchange, together with the other ranks."""
    group = exchange or LocalExchange()
    batches = list(_batches(targets))
    for number in range(_rounds(group, len(batches))):
        batch = batches[number] if number < len(batches) else []
        buffers = [_buffer(target) for target in batch]
        wants = [Want(t.entry, t.box, k) for k, t in enumerate(batch)]
        flat = [each.reshape(-1).view(torch.uint8) for each in buffers]
        reads = WindowReads(reader, flat, threads)
        if group.world == 1:
            reads.run(plan_load(wants))
        else:
            read_exchanged(reader, reads, plan_load(wants), group, threads)
        for target, buffer in zip(batch, buffers, strict=True):
            if buffer is not target.view:
                target.view.copy_(buffer)


def _rounds(group: Exchange, mine: int) -> int:
    """Return the most batches of any rank: all take part in all of them."""
    counts = bodies(group.all_gather(done(str(mine).encode())))
    return max(int(count) for count in counts)


def _direct(target: Target) -> bool:
    """Return whether the bytes can be read to where they belong."""
    view = target.view
    return (
        view.device.type == "cpu"
        and view.dtype == DTYPES[target.entry.dtype]
        and view.is_contiguous()
        and not (view.is_conj() or view.is_neg())
    )


def _buffer(target: Target) -> torch.Tensor:
    if _direct(target):
        return target.view
    return torch.empty(target.box.sizes, dtype=DTYPES[target.entry.dtype])


def _batches(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield groups of targets that need bounded memory of their own."""
    batch = [target for target in targets if _direct(target)]
    room = BATCH_BYTES
    for target in targets:
        if _direct(target):
            continue
        for piece in _rows(target):
            size = tensor_bytes(piece.entry.dtype, piece.box.sizes)
            if batch and size > room:
                yield batch
                batch, room = [], BATCH_BYTES
            batch.append(piece)
            room -= size
    if batch:
        yield batch


def _rows(target: Target) -> Iterator[Target]:
    """Cut a target along its first dim into pieces of about :data:`STAGE_BYTES`."""
    entry, box, view = target
    size = tensor_bytes(entry.dtype, box.sizes)
    if size <= STAGE_BYTES or not box.sizes or box.sizes[0] == 1:
        yield target
        return
    rows = max(1, box.sizes[0] * STAGE_BYTES // size)
    for first in range(0, box.sizes[0], rows):
        count = min(rows, box.sizes[0] - first)
        part = Box((box.offsets[0] + first, *box.offsets[1:]), (count, *box.sizes[1:]))
        yield Target(entry, part, view.narrow(0, first, count))


def _refused(code: str, what: str, names: Sequence[str]) -> ConfigError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ConfigError(
        f"{', '.join(map(repr, names[:3]))}{more}: {what}",
        code=code,
        next_step="`fabric-ckpt inspect --tensors` lists what is stored; name what "
        "differs with renames, or allow it",
    )
