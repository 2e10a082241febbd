"""Single files of ``torch.save`` (``.pt``, ``.pth``, ``.bin``): weights and state.

Only what is data is read: tensors, numbers, texts and their containers. A file is
written as one that ``torch.load(weights_only=True)`` returns; tied tensors share their
storage in it, as they do in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from checkpoints.formats.extent_source import ExtentSource, StoredTensor
from checkpoints.formats.pickle_values import OrderedRecord, TensorRef
from checkpoints.formats.sink import (
    Bundle,
    OutTensor,
    Plan,
    PlannedFile,
    SinkOptions,
)
from checkpoints.formats.source import Ignored, Source
from checkpoints.formats.state_leaves import leaves
from checkpoints.formats.state_names import name_state, nested_state
from checkpoints.formats.torch_zip import Archive, read_archive
from checkpoints.formats.torch_zip_writer import (
    NewArchive,
    NewEntry,
    tensor_call,
    whole_tensor,
)
from checkpoints.manifest import FileEntry

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".th", ".tar")
"""Of files that torch wrote before it wrote archives: those are told to be old."""

FILE_NAME = "checkpoint.pt"


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a file of ``torch.save``."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begin = file.read(4)
    return begin == b"PK\x03\x04" or (
        begin[:1] == b"\x80" and path.suffix.lower() in SUFFIXES
    )


def open_source(path: Path) -> Source:
    """Open a file of ``torch.save``.

    Raises:
        IntegrityError: it is damaged, holds what is not data, or is of another kind.
    """
    archive = read_archive(path.parent, path.name)
    named = name_state(list(leaves(archive.value)), TensorRef)
    tensors, aliases = share(archive, named.tensors)
    ignored = [*named.ignored, *_versions(archive.value)]
    return ExtentSource(
        "torch",
        path,
        path.parent,
        tensors,
        aliases=aliases,
        state=named.state,
        ignored=ignored,
        checksums=archive.checksums,
    )


def share(
    archive: Archive, found: Mapping[str, TensorRef]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return where tensors lie, and which are another one's elements (tied weights)."""
    tensors: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    first: dict[TensorRef, str] = {}
    for name in sorted(found):
        ref = found[name]
        known = first.setdefault(ref, name) if 0 not in ref.shape else name
        if known == name:
            tensors[name] = archive.stored(ref)
        else:
            aliases[name] = known
    return tensors, aliases


def _versions(value: object, depth: int = 0) -> Iterator[Ignored]:
    """Yield a note if there are versions of modules, which torch hides in a dict."""
    if isinstance(value, OrderedRecord) and value.attributes:
        yield Ignored("_metadata", "versions of torch's modules")
    elif isinstance(value, dict) and depth < 2:
        found = (note for each in value.values() for note in _versions(each, depth + 1))
        yield from list(found)[:1]


class TorchFileSink:
    """Writes one ``.pt``; see :class:`checkpoints.formats.sink.Sink`."""

    format = "torch"

    def plan(self, bundle: Bundle, options: SinkOptions) -> Plan:
        """Return what would be written."""
        keys = {name: str(at) for at, name in enumerate(sorted(bundle.tensors))}
        storages = [
            NewEntry(key, bundle.tensors[name].size_bytes, bundle.tensors[name].read)
            for name, key in keys.items()
        ]
        state = number_parameters(nested_state(bundle))

        def call(tensor: OutTensor) -> object:
            key = keys[tensor.name]
            size = tensor.size_bytes
            return tensor_call(whole_tensor(key, tensor.dtype, tensor.shape, size))

        archive = NewArchive(with_calls(state, call), storages)
        file = PlannedFile(FILE_NAME, tuple(keys), archive.size, archive.chunks)
        return Plan([file], _finish, single_file=True)


def number_parameters(state: dict[str, object]) -> dict[str, object]:
    """Give parameters that torch had numbered their numbers again, in place."""
    optimizer = state.get("optimizer")
    known = optimizer.get("state") if isinstance(optimizer, dict) else None
    if isinstance(known, dict) and known and all(map(str.isdecimal, known)):
        assert isinstance(optimizer, dict)
        optimizer["state"] = {int(key): value for key, value in known.items()}
    return state


def with_calls(value: object, call: Callable[[OutTensor], object]) -> object:
    """Return a nested state with each tensor replaced by what ``call`` gives."""
    if isinstance(value, OutTensor):
        return call(value)
    if isinstance(value, dict):
        return {key: with_calls(item, call) for key, item in value.items()}
    return value


def _finish(directory: Path, files: Mapping[str, FileEntry]) -> None:
    """There is no index beside the file."""


SINK = TorchFileSink()
