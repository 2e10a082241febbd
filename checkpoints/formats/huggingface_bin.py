"""A model as transformers stored it before safetensors: files of ``torch.save``.

Each file is a state dictionary, read as data like any other archive of torch: nothing
in it is executed. With an index, every file that it names must be there and hold just
the tensors that it says.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints.formats.extent_source import ExtentSource, StoredTensor
from checkpoints.formats.huggingface import (
    check_index,
    index_fault,
    model_state,
    other_files,
    read_index_untrusted,
    tied_aliases,
)
from checkpoints.formats.pickle_values import TensorRef
from checkpoints.formats.source import MODEL, Ignored, Source
from checkpoints.formats.state_leaves import leaves
from checkpoints.formats.torch_file import share
from checkpoints.formats.torch_zip import Archive, read_archive
from checkpoints.model_config import MODEL_CONFIG_KEY
from fabric.core.errors import ConfigError

SINGLE_NAME = "pytorch_model.bin"
INDEX_NAME = f"{SINGLE_NAME}.index.json"


def sniff(path: Path) -> bool:
    """Return whether ``path`` is a directory with a model of torch files."""
    return any((path / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def open_source(path: Path) -> Source:
    """Open a model's directory.

    Raises:
        ConfigError: no such model there.
        IntegrityError: a file is missing, damaged, holds what is not data, or is not as
            the index says.
    """
    if not sniff(path):
        raise ConfigError(
            f"neither {SINGLE_NAME} nor {INDEX_NAME} in {path}", code="E_NOT_FOUND"
        )
    index = {}
    if not (path / SINGLE_NAME).is_file():
        index = read_index_untrusted(path, INDEX_NAME)
    names = sorted(set(index.values())) or [SINGLE_NAME]
    archives = {name: read_archive(path, name) for name in names}
    where: dict[str, str] = {}
    tensors: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    ignored: list[Ignored] = []
    for name, archive in archives.items():
        found, left = _tensors(path, archive)
        for key in found:
            if where.setdefault(key, name) != name:
                raise index_fault(path, f"{key!r} in two files")
        stored, shared = share(
            archive, {MODEL + key: ref for key, ref in found.items()}
        )
        tensors |= stored
        aliases |= shared
        ignored += left
    check_index(path, index, where)
    state = model_state(path)
    config = state.get(MODEL_CONFIG_KEY)
    tied = tied_aliases(config, where) if isinstance(config, dict) else {}
    return ExtentSource(
        "huggingface-bin",
        path,
        path,
        tensors,
        aliases=aliases | {head: aliases.get(of, of) for head, of in tied.items()},
        state=state,
        ignored=[*ignored, *other_files(path, {*names, INDEX_NAME})],
        checksums=[each for archive in archives.values() for each in archive.checksums],
    )


def _tensors(
    path: Path, archive: Archive
) -> tuple[dict[str, TensorRef], list[Ignored]]:
    """Return the tensors of a state dictionary, and what else is in it."""
    found: dict[str, TensorRef] = {}
    ignored = []
    for place, value in leaves(archive.value):
        name = ".".join(map(str, place))
        if not isinstance(value, TensorRef):
            ignored.append(Ignored(f"{archive.file}: {name[:200]}", "not a tensor"))
        elif len(place) != 1 or name in found:
            raise index_fault(
                path, f"{archive.file}: {name[:200]!r} is not in a state dictionary"
            )
        else:
            found[name] = value
    return found, ignored
