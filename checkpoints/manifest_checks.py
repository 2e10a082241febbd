"""The door for manifests, and what must hold between the parts of one."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise

import msgspec

from checkpoints.boxes import inside, tiling_fault, whole
from checkpoints.dtypes import item_bytes, tensor_bytes
from checkpoints.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MAX_BLOCKS,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    TensorEntry,
    encode_manifest,
)
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ConfigError, IntegrityError, ResourceExhausted

# One path component that cannot be hidden, absolute, "..", or another kind of file.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class _Preamble(msgspec.Struct):
    """The two fields that every version keeps."""

    format: str
    version: int


_PREAMBLE = msgspec.json.Decoder(_Preamble)
_MANIFEST = msgspec.json.Decoder(Manifest)
# What msgspec and json raise on hostile input; UnicodeError is a ValueError.
_DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


def load_manifest_untrusted(data: bytes) -> Manifest:
    """Decode and check a manifest from a file or a peer.

    Raises:
        IntegrityError: oversized, malformed, not canonical, or inconsistent: the checks
            of :func:`check_manifest` have passed otherwise.
        ConfigError: written in a version this program does not know.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise _bad(f"{len(data)} B > {MAX_MANIFEST_BYTES} B")
    try:
        preamble = _PREAMBLE.decode(data)
        if preamble.format != FORMAT_NAME:
            raise _bad(f"format {preamble.format[:40]!r}, not {FORMAT_NAME!r}")
        if preamble.version != FORMAT_VERSION:
            raise ConfigError(
                f"manifest of version {preamble.version}; this program reads 1",
                code="E_VERSION",
                next_step="use a newer version of this program",
            )
        manifest = _MANIFEST.decode(data)
        canonical = encode_manifest(manifest)
    except _DECODE_ERRORS as exc:
        raise _bad(str(exc)[:300]) from exc
    if canonical != data:
        raise _bad("not in canonical form (duplicate keys, white space, key order?)")
    check_manifest(manifest)
    return manifest


def _bad(reason: str) -> IntegrityError:
    return IntegrityError(
        f"manifest: {reason}",
        code="E_MANIFEST",
        next_step="the checkpoint is damaged or not one: use another copy or step",
    )


def check_manifest(manifest: Manifest) -> None:
    """Pass if every tensor is complete and every byte range lies in a listed file.

    Raises:
        IntegrityError: with a code that says which rule is broken: ``E_FILE_NAME``,
            ``E_NAME``, ``E_DTYPE``, ``E_BOUNDS``, ``E_TILING``, ``E_BYTES_SHARED``,
            ``E_ALIAS``, ``E_BLOCKS``.
        ResourceExhausted: more blocks than :data:`MAX_BLOCKS`.
    """
    for name, file in manifest.files.items():
        check_file_name(name)
        _check_file(name, file)
    blocks = sum(len(file.blocks) for file in manifest.files.values())
    if blocks > MAX_BLOCKS:
        raise ResourceExhausted(f"{blocks} blocks > {MAX_BLOCKS}", code="E_BLOCKS")
    for name, tensor in manifest.tensors.items():
        check_tensor_name(name)
        _check_tensor(name, tensor, manifest.files)
    _check_byte_ranges(manifest)
    for alias, target in manifest.aliases.items():
        check_tensor_name(alias)
        if alias in manifest.tensors or target not in manifest.tensors:
            raise _broken("E_ALIAS", f"alias {alias!r} of {target!r}")


def check_file_name(name: str) -> None:
    """Pass if ``name`` is one plain component that ends in ``.safetensors``."""
    if not _FILE_NAME.fullmatch(name):
        raise _broken("E_FILE_NAME", f"file name {name[:80]!r}")


def check_tensor_name(name: str) -> None:
    """Pass if ``name`` has no control characters and is not reserved."""
    if _CONTROL.search(name) or name == "__metadata__":
        raise _broken("E_NAME", f"tensor name {name[:80]!r}")


def _check_file(name: str, file: FileEntry) -> None:
    wanted = -(-file.size // BLOCK_BYTES)
    if len(file.blocks) != wanted:
        raise _broken(
            "E_BLOCKS",
            f"{name}: {len(file.blocks)} block hashes for {file.size} B ({wanted})",
        )


def _check_tensor(name: str, tensor: TensorEntry, files: dict[str, FileEntry]) -> None:
    item_bytes(tensor.dtype)
    for chunk in tensor.chunks:
        if not inside(chunk.box, tensor.shape) or not chunk.box.volume:
            raise _broken(
                "E_BOUNDS",
                f"{name!r}: chunk at {list(chunk.offsets)} of {list(chunk.sizes)} "
                f"is empty or outside shape {list(tensor.shape)}",
            )
        size = tensor_bytes(tensor.dtype, chunk.sizes)
        file = files.get(chunk.file)
        if file is None or chunk.end - chunk.begin != size or chunk.end > file.size:
            raise _broken(
                "E_BOUNDS",
                f"{name!r}: {size} B at {chunk.begin}..{chunk.end} of "
                f"{chunk.file!r} ({file.size if file else 'not listed'})",
            )
    fault = tiling_fault(tensor.shape, (chunk.box for chunk in tensor.chunks))
    if fault is not None:
        what = "a gap" if fault.covered < 1 else f"an overlap of {fault.covered}"
        raise _broken("E_TILING", f"{name!r}: chunks leave {what} at {list(fault.at)}")
    assert tensor.chunks or not whole(tensor.shape).volume


def _check_byte_ranges(manifest: Manifest) -> None:
    """Pass if no two chunks share bytes; tied tensors are aliases instead."""
    ranges: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            ranges[chunk.file].append((chunk.begin, chunk.end, name))
    for file, spans in ranges.items():
        spans.sort()
        for (_, end, first), (begin, _, second) in pairwise(spans):
            if begin < end:
                raise _broken(
                    "E_BYTES_SHARED", f"{first!r} and {second!r} overlap in {file}"
                )


def _broken(code: str, reason: str) -> IntegrityError:
    return IntegrityError(
        reason, code=code, next_step="use another copy or step of this checkpoint"
    )
