"""Checkpoints of Megatron-core, format ``torch_dist`` (``iter_<n>``).

A torch distributed checkpoint whose names are those of Megatron's sharded tensors, with
``metadata.json`` beside it, which says so. What is no tensor is in ``common.pt``, or in
an object ``common_state`` in later versions; objects of ranks have names like
``rng_state/shard_0_2``.

Optimizer tensors are of parameters (``fully_reshardable``) or of buffers that many
parameters lie in (``dp_reshardable``): which ones, only the program that wrote them
knows, so these are carried under the buffer's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from checkpoints.formats.bytecheckpoint import LATEST_NAME, latest_step
from checkpoints.formats.dcp_files import read_contents
from checkpoints.formats.dcp_index import (
    METADATA,
    METADATA_NAME,
    DcpIndex,
    Dialect,
    read_index,
)
from checkpoints.formats.pickle_values import Global, TensorRef
from checkpoints.formats.source import Ignored, Source
from checkpoints.formats.state_leaves import Path as StatePath
from checkpoints.formats.state_leaves import leaves
from checkpoints.formats.stored_state import FlatTensor, build_source, found_leaves
from checkpoints.formats.torch_zip import read_archive
from fabric.core.errors import IntegrityError

CONFIG_NAME = "metadata.json"
COMMON_NAME = "common.pt"
STEP_PREFIX = "iter_"
BACKENDS = {"torch_dist": 1}
"""Ways of storing sharded tensors that are read -> the latest version known here."""
MAX_CONFIG_BYTES = 1 << 16

_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"
MODULES = ("megatron", "transformer_engine", "torch.distributed.checkpoint.planner")
"""Classes that its state and index mention; they become records like all others."""
DIALECT = Dialect(
    metadata=(METADATA, Global(_STRATEGY, "MCoreMetadata")), modules=MODULES
)

_SHARD = re.compile(r"(?P<key>.+)/shard_(?P<at>[0-9.]*)_[0-9.]*")
_SLOT = re.compile(r"optimizer\.state\.(?P<slot>[^.]+)\.(?P<name>.+)")
_BUFFER = re.compile(r"optimizer\.(?P<name>distributed\..+)\.(?P<slot>[^.]+)")
MASTER = "fp32"
_COMMON_KEYS = ("common_state",)


class _Config(msgspec.Struct):
    sharded_backend: str
    sharded_backend_version: int = 1


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a step, or a directory of steps with a latest one."""
    if (path / CONFIG_NAME).is_file():
        with (path / CONFIG_NAME).open("rb") as file:
            return b'"sharded_backend"' in file.read(MAX_CONFIG_BYTES)
    steps = path.glob(f"{STEP_PREFIX}*/{CONFIG_NAME}")
    return (path / LATEST_NAME).is_file() and any(steps)


def open_source(path: Path) -> Source:
    """Open a step of Megatron-core.

    Raises:
        ConfigError: there is none.
        IntegrityError: another way of storing (``E_FORMAT``), or it is damaged, not
            whole, or hostile.
    """
    step = latest_step(path, STEP_PREFIX)
    _check_backend(step)
    index = read_index(step, DIALECT)
    _check_flattened(index)
    contents = read_contents(step, index, modules=MODULES)
    found = found_leaves(_paths(index), contents)
    ignored = [*_buffers(index)]
    if (step / COMMON_NAME).is_file():
        common, told = _common(step)
        found += common
        ignored += told
    found = [(_unwrapped(place), value) for place, value in found]
    return build_source("megatron", path, step, found, [contents], ignored)


def _check_backend(step: Path) -> None:
    """Pass if tensors are stored as is read here."""
    data = (step / CONFIG_NAME).read_bytes()[:MAX_CONFIG_BYTES]
    try:
        config = msgspec.json.decode(data, type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise IntegrityError(
            f"{CONFIG_NAME}: {exc}",
            code="E_INDEX",
            next_step="the file is damaged: fetch it again, or use another step",
        ) from exc
    known = BACKENDS.get(config.sharded_backend, 0)
    if config.sharded_backend_version > known or not (step / METADATA_NAME).is_file():
        raise IntegrityError(
            f"{CONFIG_NAME}: tensors stored as {config.sharded_backend[:40]!r} version "
            f"{config.sharded_backend_version}",
            code="E_FORMAT",
            next_step="save it again with --ckpt-format torch_dist",
        )


def _check_flattened(index: DcpIndex) -> None:
    """Pass if no tensor is a flattened range of another one.

    Megatron before 0.14 reshaped such tensors by a rule that needs the layout of the
    ranks; later versions do not read them either.
    """
    data = index.root.get("mcore_data")
    for name, entry in data.items() if isinstance(data, dict) else ():
        if isinstance(entry, dict) and "nd_reformulated_orig_global_shape" in entry:
            raise IntegrityError(
                f"{str(name)[:200]!r} is stored in flattened ranges",
                code="E_FORMAT",
                next_step="load it with the Megatron-core that wrote it, and save it "
                "with --dist-ckpt-optim-fully-reshardable",
            )


def _paths(index: DcpIndex) -> dict[str, StatePath]:
    """Return the path in a state for each of Megatron's names."""
    paths: dict[str, StatePath] = {}
    for name in index.tensors:
        slot = _SLOT.fullmatch(name) or _BUFFER.fullmatch(name)
        if slot:
            kind = MASTER if slot["slot"] in ("fp32_param", "param") else slot["slot"]
            paths[name] = ("optimizer", "state", slot["name"], kind)
        else:
            paths[name] = ("model", name)
    for name in index.objects:
        shard = _SHARD.fullmatch(name)
        if shard is None:
            paths[name] = ("objects", name)
        elif shard["key"] in _COMMON_KEYS:
            paths[name] = (shard["key"],)
        else:
            section = "rng" if shard["key"].startswith("rng") else "objects"
            paths[name] = (section, f"{shard['key']}.{shard['at']}")
    return paths


def _unwrapped(place: StatePath) -> StatePath:
    """Return the path of what is in the common state: a list of one dictionary."""
    return place[2:] if place[:1] == _COMMON_KEYS and len(place) > 2 else place


def _buffers(index: DcpIndex) -> Iterator[Ignored]:
    if any(_BUFFER.fullmatch(name) for name in index.tensors):
        yield Ignored(
            "optimizer.distributed",
            "which parameters lie where in its buffers, which was not saved: they are "
            "carried whole (optimizer/<slot>/distributed...); save with "
            "--dist-ckpt-optim-fully-reshardable for moments by parameter",
        )


def _common(step: Path) -> tuple[list[tuple[StatePath, object]], list[Ignored]]:
    """Return the leaves of the file of what is no tensor, or why it is not read."""
    try:
        archive = read_archive(step, COMMON_NAME, modules=MODULES)
    except IntegrityError as error:
        if error.code != "E_PICKLE":
            raise
        return [], [Ignored(COMMON_NAME, f"not data: {error.reason}")]
    found: list[tuple[StatePath, object]] = []
    for path, value in leaves(archive.value):
        if isinstance(value, TensorRef):
            leaf = FlatTensor("", archive.stored(value))
            found.append((("common", ".".join(map(str, path))), leaf))
        else:
            found.append((path, value))
    return found, []
