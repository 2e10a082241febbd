"""A blob cut into k pieces and m more, any k of which restore it. Blocking; needs zfec.

    stream   = length of the manifest (4 B), the manifest, zeros up to a block, the blob
    stripe s = blocks s*k ... s*k+k-1 of the stream, zeros behind its end
    piece i  = block i of every encoded stripe

Each piece is a blob of its own, found, fetched and verified like any other. The pieces
of a blob are the same wherever they are made, so a lost one is made again from the
blob. Memory is k+m blocks at any size.

Source: Rizzo, "Effective erasure codes for reliable computer communication protocols"
(1997), as zfec implements it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dht.blobs import BlobStore, Mark
from dht.export import BlobReader
from dht.manifest import BlobManifest, decode_manifest_untrusted
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import ConfigError, IntegrityError, RemoteProtocolError
from fabric.core.ids import BlobId

if TYPE_CHECKING:
    from types import ModuleType

_LENGTH = struct.Struct(">I")
MAX_PIECES = 32


def check_code(data: int, extra: int) -> None:
    """Pass if blobs can be cut into ``data`` pieces and ``extra`` more here.

    Raises:
        ConfigError: too few or too many, or zfec is not installed.
    """
    if data < 1 or extra < 1 or data + extra > MAX_PIECES:
        raise ConfigError(
            f"erasure {data}+{extra}: needs 1+1 to at most {MAX_PIECES} pieces",
            next_step='"4+2" costs half a copy more and survives two losses',
        )
    _zfec()


def _zfec() -> ModuleType:
    try:
        import zfec
    except ImportError as exc:
        raise ConfigError(
            "erasure coding needs zfec, which is not installed",
            code="E_NO_ZFEC",
            next_step="pip install 'peerfabric[erasure]'",
        ) from exc
    module: ModuleType = zfec
    return module


def make_pieces(
    blobs: BlobStore, root: BlobId, data: int, extra: int, mark: Mark | None = None
) -> tuple[BlobId, ...]:
    """Keep all pieces of ``root`` as blobs and return their roots, in order.

    Args:
        blobs: Holds it.
        root: What to cut.
        data: As many pieces restore it.
        extra: Pieces more than that.
        mark: See :data:`dht.blobs.Mark`.

    Raises:
        ConfigError: see :func:`check_code`.
        Unavailable: ``root`` is not (completely) here.
        IntegrityError: it is damaged on this disk.
        ResourceExhausted: no room; nothing is left behind.
    """
    check_code(data, extra)
    encoder: Any = _zfec().Encoder(data, data + extra)
    manifest = blobs.manifest(root)
    head = _head(blobs.raw_manifest(root))
    stripes = math.ceil((len(head) // BLOCK_BYTES + manifest.num_blocks) / data)
    with blobs.open_reader(root) as reader, ExitStack() as stack:
        writers = [
            stack.enter_context(blobs.adding(stripes * BLOCK_BYTES))
            for _ in range(data + extra)
        ]
        blocks = _stream(head, reader)
        for _ in range(stripes):
            stripe = [next(blocks, b"").ljust(BLOCK_BYTES, b"\0") for _ in range(data)]
            for writer, block in zip(writers, encoder.encode(stripe), strict=True):
                writer.write(block)
        return tuple(
            blobs.finish_add(
                writer, f"{root[:16]}.{number}", _meta(root, number), (), mark
            )
            for number, writer in enumerate(writers)
        )


def _head(raw: bytes) -> bytes:
    head = _LENGTH.pack(len(raw)) + raw
    return head.ljust(-(-len(head) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")


def _meta(root: BlobId, number: int) -> dict[str, str]:
    return {"piece": str(number), "of": root}


def _stream(head: bytes, reader: BlobReader) -> Iterator[bytes]:
    for at in range(0, len(head), BLOCK_BYTES):
        yield head[at : at + BLOCK_BYTES]
    for index in range(reader.manifest.num_blocks):
        yield reader.read_verified(index)


def restore(
    blobs: BlobStore, root: BlobId, pieces: Sequence[BlobId], data: int
) -> None:
    """Keep ``root``, restored from any ``data`` of ``pieces`` that are here.

    Args:
        blobs: Holds the pieces and gets the blob.
        root: What to restore: every block is verified against it.
        pieces: All pieces, in order.
        data: As many are needed.

    Raises:
        ConfigError: zfec is not installed.
        IntegrityError: too few pieces are here, or they are another blob's.
        ResourceExhausted: no room.
    """
    here = {n: piece for n, piece in enumerate(pieces) if blobs.has(piece)}
    if len(here) < data:
        raise IntegrityError(
            f"{len(here)} of {data} pieces of {root[:12]} are here",
            code="E_PIECES",
            next_step="fetch more of them",
        )
    chosen = dict(list(here.items())[:data])
    with ExitStack() as stack:
        readers = {
            number: stack.enter_context(blobs.open_reader(piece))
            for number, piece in chosen.items()
        }
        blocks = _decoded(readers, data, len(pieces))
        manifest = _read_head(blocks, root)
        partial = blobs.open_partial(root, manifest)
        try:
            for index in range(manifest.num_blocks):
                block = next(blocks, b"")[: manifest.block_bytes(index)]
                if not partial.write_block(index, block):
                    raise IntegrityError(f"pieces of {root[:12]} give another block")
            blobs.finish(partial)
        finally:
            blobs.release(partial)


def _decoded(
    readers: Mapping[int, BlobReader], data: int, total: int
) -> Iterator[bytes]:
    decoder: Any = _zfec().Decoder(data, total)
    numbers = list(readers)
    stripes = min(reader.manifest.num_blocks for reader in readers.values())
    for stripe in range(stripes):
        blocks = [reader.read_verified(stripe) for reader in readers.values()]
        if any(len(block) != BLOCK_BYTES for block in blocks):
            raise IntegrityError("a piece is cut off")
        yield from decoder.decode(blocks, numbers)


def _read_head(blocks: Iterator[bytes], root: BlobId) -> BlobManifest:
    head = next(blocks, b"")
    if len(head) < _LENGTH.size:
        raise IntegrityError("the pieces are empty")
    (size,) = _LENGTH.unpack_from(head)
    end = _LENGTH.size + size
    while len(head) < end:
        more = next(blocks, b"")
        if not more:
            raise IntegrityError("the pieces end inside the manifest")
        head += more
    try:
        return decode_manifest_untrusted(head[_LENGTH.size : end], root)
    except RemoteProtocolError as exc:
        raise IntegrityError(f"the pieces hold no manifest: {exc.reason}") from exc
