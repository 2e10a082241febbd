"""The ``fabric-ckpt`` command, also mounted as ``fabric ckpt``. Needs no torch.

Exit codes: 0 ok, 1 failed or different (diff), 2 usage, 6 disk full, 8 integrity,
130 interrupted.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import cyclopts

from checkpoints import cli_convert
from checkpoints.cli_output import (
    progress,
    show,
    show_error,
    show_json,
    size_text,
    talk,
)
from checkpoints.comparison import diff_checkpoints
from checkpoints.directories import list_steps
from checkpoints.inspection import Inspection, inspect_checkpoint
from checkpoints.name_maps import load_map, map_names
from checkpoints.verification import VerifyReport, verify_checkpoint
from fabric.core.errors import ConfigError, FabricError, IntegrityError

app = cyclopts.App(
    name="fabric-ckpt",
    help="Look into, check and convert checkpoints. Needs no GPU and no torch.",
    version=lambda: version("peerfabric"),
    result_action="return_value",
)
cli_convert.add_to(app)

MAX_SHOWN_FINDINGS = 20


@app.command
def inspect(
    path: Path,
    *,
    root: str = "",
    from_format: str = "",
    tensors: bool = False,
    json: bool = False,
) -> None:
    """Show what a checkpoint of any format holds; reads its index only.

    Args:
        path: A file or directory; of canonical checkpoints a step, or the directory
            whose `latest` names one.
        root: Root id that it must have.
        from_format: Its format, if it is not found out.
        tensors: List every tensor.
        json: Print JSON, tensors included.
    """
    found = inspect_checkpoint(path, root=root, from_format=from_format)
    if json:
        show_json(found)
        return
    show(f"path    {found.path}")
    show(f"format  {found.format}")
    if found.root:
        _show_step(found, path)
    for name, section in sorted(found.sections.items()):
        show(
            f"{name + '/':8}{section.tensors} tensors, {section.elements} elements, "
            f"{size_text(section.size_bytes)}"
        )
    for file, size in sorted(found.files.items()):
        show(f"file    {file}  {size_text(size)}")
    show(f"state   {' '.join(sorted(found.state)) or '-'}")
    for each in found.ignored:
        show(f"left    {each.name}: {each.reason}")
    for tensor in found.tensors if tensors else ():
        alias = f" = {tensor.alias_of}" if tensor.alias_of else ""
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        show(f"tensor  {tensor.name}  {tensor.dtype} {shape}{alias}")


def _show_step(found: Inspection, path: Path) -> None:
    show(f"root    {found.root}")
    show(f"step    {found.step}")
    show(f"parent  {found.parent or '-'}")
    steps = [str(step) for step in list_steps(path)]
    if steps:
        show(f"steps   {' '.join(steps)}")


@app.command
def verify(path: Path, *, root: str = "", json: bool = False) -> None:
    """Read every byte and compare it with its hash; exit 8 if anything is wrong.

    Formats other than the canonical one hold no hashes: of them this checks that every
    element is there once, and can be read.

    Args:
        path: A file or directory; of canonical checkpoints a step, or the directory
            whose `latest` names one.
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
    if report.ok and report.hashed:
        show(
            f"ok: {report.tensors} tensors, {report.files} files, {report.blocks} "
            f"blocks, {size_text(report.checked_bytes)}, root {report.root}"
        )
    elif report.ok:
        show(
            f"whole: {report.tensors} tensors, {size_text(report.checked_bytes)}; "
            f"{report.format} has no hashes, so changed bytes are not found"
        )


@app.command
def diff(
    first: Path, second: Path, *, tensors_only: bool = False, json: bool = False
) -> None:
    """Compare two checkpoints bit by bit, of any formats; exit 1 if they differ.

    How they are cut into files does not matter.

    Args:
        first: A file or directory.
        second: Another.
        tensors_only: Leave out what is not a tensor.
        json: Print JSON.
    """
    with progress("diff") as on_progress:
        report = diff_checkpoints(
            first, second, tensors_only=tensors_only, on_progress=on_progress
        )
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


@app.command
def maps(*, json: bool = False) -> None:
    """List the name maps between the forms of model families.

    Args:
        json: Print JSON.
    """
    known = {name: load_map(name) for name in map_names()}
    if json:
        show_json(known)
        return
    for name, each in known.items():
        show(f"{name}: {each.parts_form} <-> {each.whole_form}")
        show(f"  {each.title}; {', '.join(each.model_types)}")


def mount_verbs() -> None:
    """Add the verbs of packages above this one: ``fetch``, which asks a daemon."""
    for point in entry_points(group="fabric_ckpt.verbs"):
        app.command(point.load(), name=point.name)


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
    if {"fetch", "--help", "-h"} & {*arguments[:1], *([] if arguments else ["-h"])}:
        mount_verbs()  # importing the client costs more than most verbs
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
