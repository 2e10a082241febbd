"""Read every byte of a checkpoint and say what is wrong with it."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import msgspec
from blake3 import blake3

from checkpoints.boxes import Box
from checkpoints.dtypes import tensor_bytes
from checkpoints.formats import canonical
from checkpoints.formats.registry import open_source
from checkpoints.manifest import MANIFEST_NAME
from checkpoints.parts import chunk_key
from checkpoints.progress import Progress, no_progress
from checkpoints.reader import CheckpointReader
from checkpoints.safetensors_io import HeaderEntry, read_header_untrusted
from checkpoints.verified_file import READ_BYTES, VerifiedFile
from fabric.core.digest import BLOCK_BYTES
from fabric.core.errors import IntegrityError

MAX_FINDINGS = 1000
"""Findings kept; ``num_findings`` counts all of them."""
MAX_NAMED_TENSORS = 20
"""Tensors named in one finding."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong.

    Attributes:
        code: Stable name.
        reason: A sentence.
        file: The file's name.
        block: Number of the 1 MiB block, if it is about one.
        offset: First byte of it in the file.
        tensors: Tensors with bytes there, at most :data:`MAX_NAMED_TENSORS`.
        fatal: False for what does no harm (a file that the manifest does not list).
    """

    code: str
    reason: str
    file: str = ""
    block: int | None = None
    offset: int | None = None
    tensors: tuple[str, ...] = ()
    fatal: bool = True


class VerifyReport(msgspec.Struct, kw_only=True):
    """What was read and found; ``ok`` if nothing fatal.

    Attributes:
        hashed: Bytes were compared with hashes; False for formats that have none, of
            which only the structure can be whole or not.
    """

    path: str
    format: str = "canonical"
    hashed: bool = True
    root: str = ""
    step: int | None = None
    ok: bool = True
    tensors: int = 0
    files: int = 0
    blocks: int = 0
    checked_bytes: int = 0
    num_findings: int = 0
    findings: list[Finding] = []

    def add(self, finding: Finding) -> None:
        """Count ``finding``, and keep it while there is room."""
        self.num_findings += 1
        self.ok = self.ok and not finding.fatal
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)


def verify_checkpoint(
    path: Path, *, root: str = "", on_progress: Progress = no_progress
) -> VerifyReport:
    """Return what is wrong with the checkpoint at ``path``; reads all of it.

    A format without hashes can only be structurally whole: no gap, nothing missing.

    Args:
        path: A step's directory, or the directory whose ``latest`` names one.
        root: Root id that it must have. Without one, from here or ``latest``, the
            report says that the files agree with the manifest, not whose it is.
        on_progress: See :data:`checkpoints.progress.Progress`.

    Raises:
        ConfigError: there is no checkpoint, or one of a newer version.
    """
    report = VerifyReport(path=str(path))
    if path.exists() and not canonical.sniff(path):
        _verify_structure(path, report, root, on_progress)
        return report
    try:
        reader = CheckpointReader(path, root=root)
    except IntegrityError as error:
        report.add(Finding(code=error.code, reason=error.reason, file=MANIFEST_NAME))
        return report
    with reader:
        _Verification(reader, report, on_progress).run()
    return report


def _verify_structure(
    path: Path, report: VerifyReport, root: str, on_progress: Progress
) -> None:
    """Read all of a format without hashes: whether each element is there, once."""
    report.hashed = False
    try:
        with open_source(path) as source:
            report.path, report.format = str(source.path), source.format
            names = [name for name in source.names() if name not in source.aliases]
            report.tensors = len(names)
            entries = map(source.entry, names)
            total = sum(tensor_bytes(each.dtype, each.shape) for each in entries)
            for name in names:
                for window in source.windows(name):
                    report.checked_bytes += len(window)
                    on_progress(report.checked_bytes, total)
    except IntegrityError as error:
        report.add(Finding(code=error.code, reason=error.reason))
    if root:
        reason = f"{report.format} has no root; wanted {root}"
        report.add(Finding(code="E_ROOT", reason=reason))


class _Verification:
    """One pass over the files of an open checkpoint."""

    def __init__(
        self, reader: CheckpointReader, report: VerifyReport, on_progress: Progress
    ) -> None:
        self._reader = reader
        self._manifest = reader.manifest
        self._report = report
        self._on_progress = on_progress
        self._total = sum(file.size for file in self._manifest.files.values())
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._chunks: dict[str, list[_Owned]] = defaultdict(list)
        for name, tensor in self._manifest.tensors.items():
            for chunk in tensor.chunks:
                owned = _Owned(chunk.begin, chunk.end, name, chunk.box)
                self._chunks[chunk.file].append(owned)
        for chunks in self._chunks.values():
            chunks.sort()

    def run(self) -> None:
        """Fill in the report."""
        report = self._report
        report.path = str(self._reader.path)
        report.root = self._reader.root
        report.step = self._manifest.step
        report.tensors = len(self._manifest.tensors)
        report.files = len(self._manifest.files)
        for name in sorted(self._manifest.files):
            try:
                self._check_file(name, self._reader.file(name))
            except IntegrityError as error:
                self._add(error.code, error.reason, name, 0, 2**63)
        known = {MANIFEST_NAME, *self._manifest.files}
        for stray in sorted(
            {each.name for each in self._reader.path.iterdir()} - known
        ):
            reason = f"{stray} is not in the manifest"
            report.add(
                Finding(code="E_UNLISTED", reason=reason, file=stray, fatal=False)
            )

    def _check_file(self, name: str, file: VerifiedFile) -> None:
        entry = self._manifest.files[name]
        hasher = blake3()
        damaged = False
        for begin in range(0, entry.size, READ_BYTES):
            view = self._buffer[: min(READ_BYTES, entry.size - begin)]
            file.read_raw(begin, view)
            hasher.update(view)
            for block in file.bad_blocks(begin // BLOCK_BYTES, view):
                damaged = True
                at = block * BLOCK_BYTES
                reason = f"{name}: block {block} (from byte {at}) is damaged"
                self._add("E_BLOCK", reason, name, at, at + BLOCK_BYTES, block)
            self._report.blocks += -(-len(view) // BLOCK_BYTES)
            self._report.checked_bytes += len(view)
            self._on_progress(self._report.checked_bytes, self._total)
        if not damaged and hasher.hexdigest() != entry.blake3:
            reason = f"{name}: blocks match, the hash of the whole file does not"
            self._add("E_FILE_HASH", reason, name, 0, entry.size)
        if not damaged:
            self._check_header(name)

    def _check_header(self, name: str) -> None:
        """Find chunks that the file's own header describes differently."""
        with (self._reader.path / name).open("rb") as opened:
            header = read_header_untrusted(opened)
        for chunk in self._chunks[name]:
            tensor = self._manifest.tensors[chunk.tensor]
            found = header.tensors.get(chunk_key(chunk.tensor, tensor.shape, chunk.box))
            begin = chunk.begin - header.data_begin
            wanted = HeaderEntry(
                tensor.dtype, chunk.box.sizes, (begin, begin + chunk.end - chunk.begin)
            )
            if found != wanted:
                reason = f"{name}: header and manifest differ about {chunk.tensor!r}"
                self._add("E_HEADER", reason, name, chunk.begin, chunk.end)

    def _add(
        self,
        code: str,
        reason: str,
        file: str,
        begin: int,
        end: int,
        block: int | None = None,
    ) -> None:
        """Add a finding about bytes ``begin`` to ``end`` of ``file``."""
        chunks = self._chunks[file]
        first = max(0, bisect_right(chunks, begin, key=lambda chunk: chunk.begin) - 1)
        named: dict[str, None] = {}
        for chunk in chunks[first:]:
            if chunk.begin >= end or len(named) == MAX_NAMED_TENSORS:
                break
            if chunk.end > begin:
                named[chunk.tensor] = None
        self._report.add(
            Finding(
                code=code,
                reason=reason,
                file=file,
                block=block,
                offset=begin if block is not None else None,
                tensors=tuple(named),
            )
        )


class _Owned(NamedTuple):
    """Bytes of a file, and the chunk of a tensor that lies there."""

    begin: int
    end: int
    tensor: str
    box: Box
