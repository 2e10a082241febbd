"""The ``fabric-ckpt`` command, also mounted as ``fabric ckpt``. Needs no torch.

Exit codes: 0 ok, 1 failed or different (diff), 2 usage, 6 disk full, 8 integrity,
130 interrupted.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import cyclopts

from checkpoints.cli_output import (
    progress,
    show,
    show_error,
    show_json,
    size_text,
    talk,
)
from checkpoints.conversion import ConversionReport
from checkpoints.directories import list_steps
from checkpoints.huggingface import MAX_SHARD_BYTES, export_huggingface
from checkpoints.huggingface_import import import_huggingface
from checkpoints.inspection import diff_checkpoints, inspect_checkpoint
from checkpoints.verification import VerifyReport, verify_checkpoint
from fabric.core.errors import ConfigError, FabricError, IntegrityError

app = cyclopts.App(
    name="fabric-ckpt",
    help="Look into, check and convert checkpoints. Needs no GPU and no torch.",
    version=lambda: version("peerfabric"),
    result_action="return_value",
)

MAX_SHOWN_FINDINGS = 20


@app.command
def inspect(
    path: Path, *, root: str = "", tensors: bool = False, json: bool = False
) -> None:
    """Show what a checkpoint holds; reads the manifest only.

    Args:
        path: A step-N directory, or the directory whose `latest` names one.
        root: Root id that it must have.
        tensors: List every tensor.
        json: Print JSON, tensors included.
    """
    found = inspect_checkpoint(path, root=root)
    if json:
        show_json(found)
        return
    show(f"path    {found.path}")
    show(f"root    {found.root}")
    show(f"step    {found.step}")
    show(f"parent  {found.parent or '-'}")
    steps = [str(step) for step in list_steps(path)]
    if steps:
        show(f"steps   {' '.join(steps)}")
    for name, section in sorted(found.sections.items()):
        show(
            f"{name + '/':8}{section.tensors} tensors, {section.elements} elements, "
            f"{size_text(section.size_bytes)}"
        )
    for file, size in sorted(found.files.items()):
        show(f"file    {file}  {size_text(size)}")
    show(f"state   {' '.join(sorted(found.state)) or '-'}")
    for tensor in found.tensors if tensors else ():
        alias = f" = {tensor.alias_of}" if tensor.alias_of else ""
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        show(f"tensor  {tensor.name}  {tensor.dtype} {shape}{alias}")


@app.command
def verify(path: Path, *, root: str = "", json: bool = False) -> None:
    """Read every byte and compare it with its hash; exit 8 if anything is wrong.

    Args:
        path: A step-N directory, or the directory whose `latest` names one.
        root: Root id that it must have; without it, only damage is found, not forgery.
        json: Print the report as one JSON object.
    """
    with progress("verify") as on_progress:
        report = verify_checkpoint(path, root=root, on_progress=on_progress)
    if json:
        show_json(report)
    else:
        _show_verification(report)
    if not report.ok:
        error = IntegrityError(
            f"{report.path}: {report.num_findings} findings",
            next_step="use another copy or step of this checkpoint",
        )
        show_error(error, json=False)
        raise SystemExit(error.exit_code)


def _show_verification(report: VerifyReport) -> None:
    for finding in report.findings[:MAX_SHOWN_FINDINGS]:
        severity = "" if finding.fatal else " (harmless)"
        show(f"{finding.code}{severity}: {finding.reason}")
        if finding.tensors:
            show(f"  tensors: {', '.join(finding.tensors)}")
    if report.num_findings > MAX_SHOWN_FINDINGS:
        show(f"... {report.num_findings - MAX_SHOWN_FINDINGS} more; --json shows them")
    if report.ok:
        show(
            f"ok: {report.tensors} tensors, {report.files} files, {report.blocks} "
            f"blocks, {size_text(report.checked_bytes)}, root {report.root}"
        )


@app.command
def convert(
    source: Path,
    target: Path,
    *,
    to: Literal["huggingface", "canonical"],
    root: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    step: int = 0,
    json: bool = False,
) -> None:
    """Convert a checkpoint, then read the result again and compare every tensor.

    Args:
        source: Canonical step (to huggingface), or Hugging Face directory.
        target: New directory (huggingface), or directory of steps (canonical).
        to: Format to write.
        root: Root id that a canonical source must have.
        max_shard_bytes: Tensor bytes per Hugging Face file.
        step: Step to save as (canonical).
        json: Print the report of every tensor as one JSON object.
    """
    with progress("convert") as on_progress:
        if to == "huggingface":
            report = export_huggingface(
                source,
                target,
                root=root,
                max_shard_bytes=max_shard_bytes,
                on_progress=on_progress,
            )
        else:
            report = import_huggingface(
                source, target, step=step, on_progress=on_progress
            )
    if json:
        show_json(report)
    else:
        _show_conversion(report)


def _show_conversion(report: ConversionReport) -> None:
    for outcome in report.tensors:
        if outcome.action == "not_exported":
            show(f"not exported: {outcome.source}: {outcome.reason}")
        elif outcome.action == "tied":
            show(f"tied: {outcome.source} is stored as {outcome.target}")
    for line in report.skipped:
        show(f"not converted: {line}")
    for note in report.notes:
        show(f"note: {note}")
    copied = sum(outcome.action == "copied" for outcome in report.tensors)
    show(
        f"ok: {copied} tensors, {size_text(report.copied_bytes)} to {report.target}; "
        f"read again and equal to the source, root {report.root}"
    )


@app.command
def diff(first: Path, second: Path, *, json: bool = False) -> None:
    """Compare two checkpoints bit by bit, however they are cut; exit 1 if they differ.

    Args:
        first: A step-N directory, or the directory whose `latest` names one.
        second: Another.
        json: Print JSON.
    """
    with progress("diff") as on_progress:
        report = diff_checkpoints(first, second, on_progress=on_progress)
    if json:
        show_json(report)
    else:
        for difference in report.differences:
            show(f"{difference.kind}: {difference.name} {difference.detail}".rstrip())
        if report.same:
            show(f"same: {report.compared_tensors} tensors")
    if not report.same:
        talk(f"{len(report.differences)} differences")
        raise SystemExit(1)


def _run(arguments: list[str]) -> None:
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise ConfigError(
            str(error),
            code="E_USAGE",
            next_step="`fabric-ckpt --help` lists the verbs and their options",
        ) from error


def main() -> None:
    """Run one command; map every refusal to its exit code."""
    arguments = sys.argv[1:]
    try:
        _run(arguments)
    except FabricError as error:
        show_error(error, json="--json" in arguments)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
