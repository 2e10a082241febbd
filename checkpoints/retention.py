"""Which steps stay. A step is deleted whole or not at all, and never the latest.

A pin is an empty file ``step-<n>.pin`` beside the step. A step is deleted by renaming
it to ``step-<n>.deleted`` first, which no reader looks at: a crash leaves that, and the
next run removes it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from checkpoints.directories import (
    LATEST_NAME,
    disk_errors,
    list_steps,
    locate,
    locked,
    step_path,
    sync_directory,
    write_synced,
)
from fabric.core.errors import ConfigError

_PIN = re.compile(r"step-(0|[1-9][0-9]{0,15})\.pin")
_DELETED = re.compile(r"step-(0|[1-9][0-9]{0,15})\.deleted(\.[0-9]+)?")


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept besides the latest step and pinned ones.

    Attributes:
        keep: The newest steps; 0 = all of them, nothing is ever deleted.
        keep_every: Also each step whose number is a multiple of this; 0 = none.
    """

    keep: int = 0
    keep_every: int = 0


def surplus(
    steps: Sequence[int], policy: Retention, kept: Collection[int]
) -> list[int]:
    """Return the steps to delete, ascending.

    Args:
        steps: All committed steps.
        policy: What to keep.
        kept: Pinned steps, and the one that ``latest`` names.
    """
    if policy.keep <= 0:
        return []
    newest = sorted(steps)[-policy.keep :]
    return [
        step
        for step in sorted(steps)
        if step not in newest
        and step not in kept
        and not (policy.keep_every and step % policy.keep_every == 0)
    ]


def pin(directory: Path, step: int) -> None:
    """Keep a committed step whatever the policy says, until :func:`unpin`.

    Raises:
        ConfigError: there is no such step.
    """
    with disk_errors(directory), locked(directory):
        if step not in list_steps(directory):
            raise ConfigError(f"no step {step} in {directory}", code="E_NOT_FOUND")
        path = _pin_path(directory, step)
        if not path.exists():
            write_synced(path, b"")
            sync_directory(directory)


def unpin(directory: Path, step: int) -> None:
    """Let the policy decide about a step again."""
    with disk_errors(directory):
        _pin_path(directory, step).unlink(missing_ok=True)


def pinned(directory: Path) -> set[int]:
    """Return the pinned steps."""
    found = (_PIN.fullmatch(entry.name) for entry in directory.iterdir())
    return {int(match.group(1)) for match in found if match}


def apply_retention(
    directory: Path, policy: Retention, pins: Collection[int] = ()
) -> list[int]:
    """Delete surplus steps, and what a crash left of deleted ones; return the steps.

    Args:
        directory: Holds the steps.
        policy: What to keep.
        pins: Further steps to keep.
    """
    with disk_errors(directory):
        with locked(directory):
            kept = {*pins, *pinned(directory), *_latest(directory)}
            gone = surplus(list_steps(directory), policy, kept)
            for step in gone:
                path = step_path(directory, step)
                path.rename(_free_name(path))
            if gone:
                sync_directory(directory)
        for entry in directory.iterdir():
            if _DELETED.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
    return gone


def _free_name(path: Path) -> Path:
    """Return a name for a deleted step; another deletion may still hold the first."""
    name = path.with_name(f"{path.name}.deleted")
    number = 0
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}.deleted.{number}")
    return name


def _latest(directory: Path) -> set[int]:
    if not (directory / LATEST_NAME).is_file():
        return set()
    return {int(locate(directory).path.name.removeprefix("step-"))}


def _pin_path(directory: Path, step: int) -> Path:
    path = step_path(directory, step)
    return path.with_name(f"{path.name}.pin")
