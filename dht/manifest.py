"""What a piece of content consists of. Its root is the BLAKE3 of the encoded manifest.

A blob is one run of bytes cut into 1 MiB blocks. A directory is the concatenation of
its files in path order; ``entries`` says where each file lies. Once the manifest is
checked against the root, each block is checked against the manifest, whoever sent it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.digest import BLOCK_BYTES, hex_digest
from fabric.core.errors import IntegrityError, RemoteProtocolError, ResourceExhausted
from fabric.core.ids import BlobId

MAX_BLOCKS = 100_000
"""97 GiB. Above it the list would itself have to be content."""
MAX_ENTRIES = 16_384
MAX_MANIFEST_BYTES = (4 << 20) - 4096
"""Fits one RPC response with its envelope."""
MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255
"""Longest file name of common file systems."""

Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS * BLOCK_BYTES)]


class FileEntry(msgspec.Struct, frozen=True, array_like=True):
    """Where one file of a directory lies in the blob: relative POSIX path, bytes."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PATH_BYTES)]
    offset: Size
    size: Size


class BlobManifest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """The description of one blob.

    Attributes:
        name: For people.
        size: Bytes of the blob.
        block: Bytes of a block; always 1 MiB.
        hashes: BLAKE3 of each block; the last block may be shorter.
        meta: Free text, such as a media type or a checkpoint step.
        entries: Files in path order, without gaps; empty for a single file.
    """

    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_BYTES)]
    size: Size
    block: int = BLOCK_BYTES
    hashes: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=MAX_BLOCKS)]
    meta: Annotated[
        dict[
            Annotated[str, msgspec.Meta(max_length=64)],
            Annotated[str, msgspec.Meta(max_length=1024)],
        ],
        msgspec.Meta(max_length=32),
    ] = {}
    entries: Annotated[tuple[FileEntry, ...], msgspec.Meta(max_length=MAX_ENTRIES)] = ()

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.hashes)

    def block_bytes(self, index: int) -> int:
        """Return the size of block ``index``."""
        return min(BLOCK_BYTES, self.size - index * BLOCK_BYTES)


class BlobStat(msgspec.Struct, frozen=True):
    """One blob of the store; sizes in bytes."""

    root: BlobId
    name: str
    size: int
    num_blocks: int
    held_blocks: int
    files: int
    pinned: bool

    @property
    def complete(self) -> bool:
        """Whether every block is here."""
        return self.held_blocks == self.num_blocks


_CODEC: Codec[BlobManifest] = Codec(BlobManifest, max_bytes=MAX_MANIFEST_BYTES)


def encode_manifest(manifest: BlobManifest) -> tuple[BlobId, bytes]:
    """Return the root and the encoded form of ``manifest``.

    Raises:
        ResourceExhausted: the content is too large or has too many files.
    """
    if manifest.num_blocks > MAX_BLOCKS or len(manifest.entries) > MAX_ENTRIES:
        raise ResourceExhausted(
            f"content of {manifest.num_blocks} blocks and {len(manifest.entries)} files"
            f" > {MAX_BLOCKS} blocks or {MAX_ENTRIES} files",
            next_step="split it and add the parts",
        )
    raw = _CODEC.encode(manifest)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ResourceExhausted(
            f"manifest of {len(raw)} B > {MAX_MANIFEST_BYTES} B",
            next_step="split the content and add the parts",
        )
    return BlobId(hex_digest(raw)), raw


def decode_manifest_untrusted(raw: bytes, root: str) -> BlobManifest:
    """Return the manifest of ``root``.

    Raises:
        IntegrityError: ``raw`` is not what ``root`` names.
        RemoteProtocolError: it is, and it breaks the rules of a manifest.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise RemoteProtocolError(f"manifest of {len(raw)} B > {MAX_MANIFEST_BYTES} B")
    if hex_digest(raw) != root:
        raise IntegrityError(f"manifest does not match root {root[:12]}")
    manifest = _CODEC.decode_untrusted(raw)
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: BlobManifest) -> None:
    """Raise RemoteProtocolError unless blocks and entries tile the blob safely."""
    if manifest.block != BLOCK_BYTES:
        raise RemoteProtocolError(f"blocks of {manifest.block} B, not {BLOCK_BYTES}")
    wanted = -(-manifest.size // BLOCK_BYTES)
    if manifest.num_blocks != wanted:
        raise RemoteProtocolError(f"{manifest.num_blocks} hashes for {wanted} blocks")
    _check_entries(manifest)


def _check_entries(manifest: BlobManifest) -> None:
    if not manifest.entries:
        return
    offset = 0
    files: set[str] = set()
    directories: set[str] = set()
    for entry in manifest.entries:
        if entry.offset != offset:
            raise RemoteProtocolError(f"gap or overlap at {entry.path!r}")
        offset += entry.size
        check_path(entry.path)
        if entry.path in files:
            raise RemoteProtocolError(f"{entry.path!r} occurs twice")
        files.add(entry.path)
        parts = entry.path.split("/")
        directories.update("/".join(parts[:n]) for n in range(1, len(parts)))
    if offset != manifest.size:
        raise RemoteProtocolError(f"entries hold {offset} B of {manifest.size} B")
    both = files & directories
    if both:
        raise RemoteProtocolError(f"{min(both)!r} is both a file and a directory")


def check_path(path: str) -> None:
    """Raise RemoteProtocolError unless ``path`` stays below where it is exported.

    Backslash, colon and control characters are refused too: they are separators or
    devices elsewhere.
    """
    parts = path.split("/")
    bad = any(part in ("", ".", "..") for part in parts)
    bad = bad or any(
        len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in parts
    )
    if bad or any(c in "\\:\x7f" or c < " " for c in path) or not path.isprintable():
        raise RemoteProtocolError(f"unsafe path {path!r} in a manifest")
