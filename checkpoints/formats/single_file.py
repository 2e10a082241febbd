"""One safetensors file with everything: the form that any tool opens.

A tensor of the model has its own name; others keep their canonical one, such as
``optimizer/exp_avg/<name>``. Ties and everything that is no tensor are JSON in the
file's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from checkpoints.directories import disk_errors
from checkpoints.formats.extent_source import ExtentSource
from checkpoints.formats.shard_files import plan_file, read_file_untrusted
from checkpoints.formats.sink import Bundle, Plan, SinkOptions
from checkpoints.formats.source import MODEL, Source
from checkpoints.manifest import FileEntry, Json
from checkpoints.safetensors_io import MAX_HEADER_BYTES
from fabric.core.errors import ConfigError, IntegrityError

SUFFIX = ".safetensors"
ALIASES_KEY = "fabric.aliases"
STATE_KEY = "fabric.state"


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a file whose header may be one of safetensors."""
    if not path.is_file():
        return False
    with disk_errors(path), path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= MAX_HEADER_BYTES


def open_source(path: Path) -> Source:
    """Open one file.

    Raises:
        IntegrityError: it is damaged.
    """
    stored = read_file_untrusted(path.parent, path.name)
    return ExtentSource(
        "safetensors",
        path,
        path.parent,
        {canonical_name(name): tensor for name, tensor in stored.tensors.items()},
        aliases=_json_untrusted(path, stored.metadata, ALIASES_KEY, dict[str, str]),
        state=_json_untrusted(path, stored.metadata, STATE_KEY, dict[str, Json]),
    )


def canonical_name(name: str) -> str:
    """Return the canonical name of a tensor of the file."""
    return name if "/" in name else MODEL + name


def _json_untrusted(
    path: Path, metadata: Mapping[str, str], key: str, kind: type[dict[str, Json]]
) -> dict[str, Json]:
    try:
        return msgspec.json.decode(metadata.get(key, "{}"), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise IntegrityError(f"{path}: {key}: {exc}", code="E_JSON") from exc


class SingleFileSink:
    """Writes one safetensors file."""

    format = "safetensors"

    def plan(self, bundle: Bundle, options: SinkOptions) -> Plan:
        """See :class:`checkpoints.formats.sink.Sink`; cuts nothing."""
        del options
        tensors = {}
        for name, tensor in bundle.tensors.items():
            own = name.removeprefix(MODEL)
            key = name if "/" in own else own
            if canonical_name(key) != name or key in tensors:
                raise ConfigError(f"{name!r} has no name of its own", code="E_NAME")
            tensors[key] = tensor
        metadata = {"format": "pt"}
        for word, value in ((ALIASES_KEY, bundle.aliases), (STATE_KEY, bundle.state)):
            if value:
                metadata[word] = msgspec.json.encode(value).decode()
        return Plan(
            files=[plan_file("all" + SUFFIX, tensors, metadata, canonical_name)],
            finish=_nothing,
            single_file=True,
        )


SINK = SingleFileSink()


def _nothing(directory: Path, entries: Mapping[str, FileEntry]) -> None:
    """Do nothing: the file is all there is."""
