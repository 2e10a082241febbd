"""Convert a checkpoint of any format into any other, and prove it.

    open the source -> name maps -> plan -> files side by side -> indexes
        -> open the result -> compare every tensor -> rename

The target grows in ``<target>.tmp`` beside it, with a journal: a run that was cut off
goes on with the files that are whole. What is there under the target's name is always
complete. Memory is bounded by windows times threads, whatever the size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from checkpoints.conversion_bundle import HashedBox
from checkpoints.conversion_files import compare, files_of, write_files
from checkpoints.conversion_journal import (
    JOURNAL_NAME,
    VERSION,
    Heading,
    Journal,
    WholeFile,
    digest_of,
    discard,
    fingerprint,
    working_directory,
)
from checkpoints.conversion_plan import ConvertOptions, Prepared, prepare
from checkpoints.conversion_report import (
    ConversionReport,
    PlannedOutput,
    WrittenTensor,
    outcomes,
)
from checkpoints.directories import disk_errors, sync_directory
from checkpoints.formats.registry import open_source, sink_of
from checkpoints.formats.source import Ignored, Source
from checkpoints.progress import Progress, no_progress
from fabric.core.errors import ConfigError, IntegrityError, ResourceExhausted


def convert(
    source: Path,
    target: Path,
    options: ConvertOptions,
    *,
    on_progress: Progress = no_progress,
) -> ConversionReport:
    """Write the checkpoint ``source`` as ``target``, and compare the two.

    Args:
        source: A file or directory of a known format.
        target: New directory, or file; a directory of steps if the format has them.
        options: See :class:`checkpoints.conversion_plan.ConvertOptions`.
        on_progress: Counts bytes written, then bytes read again.

    Raises:
        ConfigError: no such format, map or target; the format cannot hold it.
        IntegrityError: the source is damaged or changed meanwhile, or the target
            differs when read again. No target is left.
        ResourceExhausted: the disk is full. No target is left, but files that are
            whole are: the same call goes on with them.
    """
    started = time.monotonic()
    sink = sink_of(options.to)
    with open_source(source, options.from_format) as opened:
        prepared = prepare(opened, sink, target, options, on_progress)
        report = _report_of(opened, prepared, options)
        try:
            _refuse_existing(prepared)
            if not options.dry_run:
                _Run(opened, prepared, options, report).run()
        finally:
            prepared.pool.close()
    report.seconds = round(time.monotonic() - started, 3)
    return report


def _report_of(
    source: Source, prepared: Prepared, options: ConvertOptions
) -> ConversionReport:
    plan, bundle = prepared.plan, prepared.bundle
    tensors = outcomes(source, prepared.mapped, bundle, plan)
    named = {each.source for each in tensors} | set(prepared.mapped.views)
    ignored = [*source.ignored, *prepared.mapped.ignored, *plan.ignored]
    where = files_of(plan)
    left_out = {each.name for each in plan.ignored} | plan.tied.keys()
    return ConversionReport(
        source=str(source.path),
        source_format=source.format,
        target=str(prepared.final),
        to=options.to,
        root=getattr(source, "root", ""),
        dry_run=options.dry_run,
        files=[
            PlannedOutput(each.path, each.size_bytes, len(each.tensors))
            for each in plan.files
        ],
        tensors=tensors,
        written=[
            WrittenTensor(
                name=name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                size_bytes=tensor.size_bytes,
                files=tuple(where.get(name, ())),
            )
            for name, tensor in sorted(bundle.tensors.items())
            if name not in left_out
        ],
        ignored=[each for each in ignored if each.name not in named],
        maps=prepared.mapped.maps,
        notes=list(plan.notes),
    )


def _refuse_existing(prepared: Prepared) -> None:
    final = prepared.final
    if prepared.plan.subdirectory and final.exists():
        raise ConfigError(
            f"{final} exists; a committed step is never overwritten",
            code="E_STEP_EXISTS",
            next_step="name another step with --step",
        )
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(
            f"{final} exists", code="E_EXISTS", next_step="name a new directory or file"
        )


class _Run:
    """Writes what was prepared, compares it, puts it in its place."""

    def __init__(
        self,
        source: Source,
        prepared: Prepared,
        options: ConvertOptions,
        report: ConversionReport,
    ) -> None:
        self._source = source
        self._prepared = prepared
        self._plan = prepared.plan
        self._options = options
        self._report = report
        self._final = prepared.final
        self._work = self._final.with_name(self._final.name + ".tmp")

    def run(self) -> None:
        """Do it; the report is complete then."""
        reserved = bool(self._plan.subdirectory)
        with disk_errors(self._final):
            self._final.parent.mkdir(parents=True, exist_ok=True)
            with working_directory(self._work, may_hold_others=reserved):
                try:
                    with disk_errors(self._work):
                        self._fill()
                        self._publish()
                except (ResourceExhausted, KeyboardInterrupt):
                    raise  # what is whole is of use to the next run
                except BaseException:
                    discard(self._work)
                    raise

    def _fill(self) -> None:
        before = fingerprint(self._source)
        journal = Journal(self._work, self._heading(before))
        if journal.started_afresh:
            self._report.notes.append(
                "files of an earlier run were discarded: the source or options differed"
            )
        self._report.resumed_files = len(journal.whole)
        written = sum(each.size_bytes for each in self._report.written)
        kept = sum(
            each.size_bytes for each in self._plan.files if each.path in journal.whole
        )
        self._prepared.meter.begin(2 * written, min(kept, written))
        files = write_files(
            self._plan,
            self._work,
            journal,
            self._prepared.meter,
            self._prepared.limits.workers,
        )
        if fingerprint(self._source) != before:
            raise IntegrityError(
                f"{self._source.path} changed while it was read",
                code="E_SOURCE_CHANGED",
                next_step="wait until nothing writes to it, and convert again",
            )
        self._finish(files)

    def _finish(self, files: Mapping[str, WholeFile]) -> None:
        """Write the indexes, then read everything again."""
        entries = {p: each.entry for p, each in files.items() if each.entry is not None}
        self._plan.finish(self._work, entries)
        result = self._work
        if self._plan.single_file:
            result = self._work / self._plan.files[0].path
        with open_source(result, self._options.to) as opened:
            hashed = compare(
                opened,
                self._prepared.bundle,
                self._plan,
                files,
                self._prepared.meter,
                workers=self._prepared.limits.workers,
                window_bytes=self._prepared.limits.window_bytes,
            )
            self._report.root = getattr(opened, "root", "") or self._report.root
            self._note_state(opened)
        self._complete(hashed)

    def _note_state(self, opened: Source) -> None:
        """Report values that are not in the result as they were in the source."""
        said = {each.name for each in self._plan.ignored}
        said |= {f"state.{key}" for key in self._plan.rewritten}
        for key, value in self._prepared.bundle.state.items():
            name = f"state.{key}"
            if name not in said and opened.state.get(key) != value:
                reason = "the format does not keep it as it was"
                self._report.ignored.append(Ignored(name, reason))

    def _complete(self, hashed: Mapping[str, list[HashedBox]]) -> None:
        report = self._report
        for number, each in enumerate(report.written):
            value = "+".join(box.blake3 for box in hashed[each.name])
            report.written[number] = type(each)(
                name=each.name,
                dtype=each.dtype,
                shape=each.shape,
                size_bytes=each.size_bytes,
                files=each.files,
                blake3=value,
            )
        report.copied_bytes = sum(each.size_bytes for each in report.written)
        report.verified = True

    def _heading(self, before: str) -> Heading:
        """Return what must be equal for files of an earlier run to be of use."""
        prepared = self._prepared
        files = [(f.path, f.size_bytes, f.tensors) for f in self._plan.files]
        tensors = {
            name: (each.dtype, each.shape, prepared.mapped.views[name].pieces)
            for name, each in prepared.bundle.tensors.items()
        }
        plan = digest_of(
            {"to": self._options.to, "files": files, "tensors": tensors}
            | {"state": prepared.bundle.state, "aliases": prepared.bundle.aliases}
        )
        return Heading(VERSION, before, plan)

    def _publish(self) -> None:
        """Rename the result into place."""
        if self._plan.publish is not None:
            self._plan.publish(self._work, self._final)
        elif self._plan.single_file:
            (self._work / self._plan.files[0].path).rename(self._final)
            sync_directory(self._final.parent)
            discard(self._work)
            return
        else:
            sync_directory(self._work)
            self._work.rename(self._final)
        (self._final / JOURNAL_NAME).unlink(missing_ok=True)
        sync_directory(self._final.parent)
