"""Save and load torch tensors. No pickle, no cast, no copy that can be avoided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from checkpoints.boxes import Box, whole
from checkpoints.hashed_file import Buffer
from checkpoints.manifest import Json
from checkpoints.parts import MAX_FILE_BYTES, ChunkSource
from checkpoints.reader import CheckpointReader
from checkpoints.writer import CheckpointWriter

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_tensors(
    directory: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Json],
    *,
    aliases: Mapping[str, str] | None = None,
    layout: Mapping[str, Json] | None = None,
    parent: str = "",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> str:
    """Save whole tensors as ``directory/step-<step>`` and return the root id.

    Args:
        directory: Holds the steps.
        step: Number of the step; it must not exist.
        tensors: By name (``model/<fqn>``, ``outer/momentum/<fqn>``). Two names of one
            tensor are stored once and recorded as aliases.
        state: Everything else as JSON; ``model_config`` holds the model's config.json.
        aliases: Further names: alias -> name in ``tensors``.
        layout: The parallel layout, for people.
        parent: Root of the checkpoint this one follows.
        max_file_bytes: Start another file above this.

    Raises:
        ConfigError: the step exists, or the file system refuses.
        ResourceExhausted: the disk is full; nothing was committed.
        ValueError: ``state`` is not JSON, or a tensor's type has no name.
    """
    stored, tied = split_tied(tensors)
    sources = [chunk_source(name, tensor) for name, tensor in stored.items()]
    with CheckpointWriter(directory, step) as writer:
        part = writer.write("writer", sources, max_file_bytes=max_file_bytes)
        return writer.commit(
            [part],
            state=state,
            aliases={**tied, **(aliases or {})},
            layout=layout,
            parent=parent,
        )


def load_tensors(
    path: Path, names: Iterable[str] | None = None, *, root: str = ""
) -> dict[str, torch.Tensor]:
    """Return tensors of a checkpoint, each in memory of its own, on the CPU.

    Args:
        path: A step's directory, or the directory whose ``latest`` names one.
        names: Tensors or aliases; None = all. Only their bytes are read.
        root: Root id that the checkpoint must have, or empty.

    Returns:
        By name. An alias and its target are one tensor.

    Raises:
        ConfigError: no checkpoint, or no tensor of a name.
        IntegrityError: a touched block or the manifest is damaged.
    """
    with CheckpointReader(path, root=root) as reader:
        wanted = reader.names() if names is None else list(names)
        targets = {name: reader.manifest.aliases.get(name, name) for name in wanted}
        loaded: dict[str, torch.Tensor] = {}
        for target in sorted(set(targets.values())):
            entry = reader.entry(target)
            tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            read_into(reader, target, tensor)
            loaded[target] = tensor
        return {name: loaded[target] for name, target in targets.items()}


def read_into(
    reader: CheckpointReader,
    name: str,
    out: torch.Tensor,
    offsets: Sequence[int] | None = None,
) -> None:
    """Fill a contiguous CPU tensor with the box of its shape at ``offsets``.

    Args:
        reader: An open checkpoint.
        name: Tensor or alias.
        out: Of the stored type; its shape is the box's sizes.
        offsets: First element in each dimension; None = the whole tensor, which must
            then have the shape of ``out``.
    """
    if offsets is None and tuple(out.shape) != reader.entry(name).shape:
        raise ValueError(f"{name!r}: {reader.entry(name).shape}, not {out.shape}")
    at = whole(out.shape).offsets if offsets is None else offsets
    reader.read_box(name, at, out.shape, byte_view(out), dtype=dtype_name(out.dtype))


def chunk_source(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
) -> ChunkSource:
    """Return a source for ``tensor``, a box of a tensor of global ``shape``.

    A tensor that is not contiguous or not on the CPU is copied when it is written, one
    at a time.
    """
    whole_shape = tuple(tensor.shape if shape is None else shape)
    box = Box(tuple(offsets or (0,) * tensor.ndim), tuple(tensor.shape))

    def read() -> Iterable[Buffer]:
        # resolve_conj: a lazily conjugated complex tensor has other bytes
        yield byte_view(tensor.detach().resolve_conj().cpu().contiguous())

    return ChunkSource(name, dtype_name(tensor.dtype), whole_shape, box, read)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared with it."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    if not tensor.is_contiguous():
        raise ValueError("tensor is not contiguous")
    array = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(cast(Buffer, array))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of ``dtype``."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} has no name in the format") from None


def split_tied(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors to store, and alias -> name for those that are the same.

    Two names are tied if they view the same memory with the same type, shape and
    strides. Tensors that only overlap are stored apart.
    """
    stored: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        key = (
            tensor.device,
            tensor.data_ptr(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
        )
        first = seen.setdefault(key, name) if tensor.numel() else name
        if first == name:
            stored[name] = tensor
        else:
            tied[name] = first
    return stored, tied
