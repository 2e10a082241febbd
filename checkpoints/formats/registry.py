"""The formats, by name; which one a path holds is told by its index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import msgspec

from checkpoints.formats.sink import Sink
from checkpoints.formats.source import Source
from fabric.core.errors import ConfigError


class Format(msgspec.Struct, frozen=True):
    """One format, its code imported when it is used.

    Attributes:
        title: For people.
        module: Module under ``checkpoints.formats`` that has ``sniff(path) -> bool``
            and ``open_source(path) -> Source``, and ``SINK`` if it can be written.
        writable: Whether it has one.
    """

    title: str
    module: str
    writable: bool = False


FORMATS: Mapping[str, Format] = {
    "canonical": Format("canonical checkpoint", "canonical", writable=True),
    "huggingface": Format("Hugging Face model", "huggingface", writable=True),
    "huggingface-bin": Format(
        "Hugging Face model of torch files (.bin)", "huggingface_bin"
    ),
    "dcp-safetensors": Format(
        "safetensors of ranks (torch distributed checkpoint)", "dcp_safetensors"
    ),
    "safetensors": Format("one safetensors file", "single_file", writable=True),
    "deepspeed": Format("DeepSpeed checkpoint (ZeRO 0-3)", "deepspeed_zero"),
    "deepspeed-universal": Format(
        "DeepSpeed universal checkpoint", "deepspeed_universal", writable=True
    ),
    "megatron": Format("Megatron-core checkpoint (torch_dist)", "megatron"),
    "bytecheckpoint": Format("ByteCheckpoint", "bytecheckpoint"),
    "dcp": Format("torch distributed checkpoint", "dcp", writable=True),
    "torch": Format("file of torch.save (.pt)", "torch_file", writable=True),
}
"""In the order in which a path is tried."""


def formats_written() -> list[str]:
    """Return the names of the formats that can be written."""
    return [name for name, each in FORMATS.items() if each.writable]


def open_source(path: Path, name: str = "") -> Source:
    """Open the checkpoint at ``path``.

    Args:
        path: A file or directory.
        name: Its format, or empty to find out.

    Raises:
        ConfigError: nothing there, no known format (``E_FORMAT``).
        IntegrityError: it is damaged, not whole, or hostile.
    """
    if not path.exists():
        raise ConfigError(f"nothing at {path}", code="E_NOT_FOUND")
    for known, each in FORMATS.items():
        module = _module(each)
        sniff: Callable[[Path], bool] = module.sniff
        opener: Callable[[Path], Source] = module.open_source
        if name == known or (not name and sniff(path)):
            return opener(path)
    raise ConfigError(
        f"{path} is no checkpoint of a format read here",
        code="E_FORMAT",
        next_step=f"formats read: {', '.join(FORMATS)}",
    )


def sink_of(name: str) -> Sink:
    """Return the writer of a format.

    Raises:
        ConfigError: there is none.
    """
    each = FORMATS.get(name)
    if each is None or not each.writable:
        raise ConfigError(
            f"{name!r} cannot be written",
            code="E_FORMAT",
            next_step=f"formats written: {', '.join(formats_written())}",
        )
    sink: Sink = _module(each).SINK
    return sink


def _module(each: Format) -> ModuleType:
    return import_module(f"checkpoints.formats.{each.module}")
