"""Forget what a peer keeps of jobs that are over; it may see thousands of them.

    promise about a job that goes on      kept: without it we could promise twice
    the job is over                       *closed*: nothing is left but that we are done
    its spec has left the mesh too        forgotten: nobody can ask about it any more

Its scratch directory stays for a while, for people who read the worker's log.

A closed job stays over here even if the status that said so is voided later.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from fabric.core.errors import FabricError
from fabric.core.ids import JobId
from fabric.jobs.config import JobsConfig
from fabric.jobs.ports import JobStore
from fabric.jobs.states import is_over

logger = logging.getLogger(__name__)

CLOSED = b""
"""What is kept instead of a promise once its job is over."""


class Task(Protocol):
    """What runs a job."""

    @property
    def ended(self) -> bool:
        """Whether it does no more; it still answers who asks."""
        ...


T = TypeVar("T", bound=Task)


def is_known_over(store: JobStore, job: JobId) -> bool:
    """Return whether the mesh says that ``job`` ended, or we closed it."""
    status = store.status(job)
    said = status is not None and is_over(status.state)
    return said or store.promise(job) == CLOSED


async def keep_retiring(
    store: JobStore, tasks: MutableMapping[JobId, T], config: JobsConfig
) -> None:
    """Retire jobs from time to time until cancelled.

    Args:
        store: Keeps promises.
        tasks: By job; the first of those that ended are dropped.
        config: Periods and bounds.
    """
    while True:
        await trio.sleep(config.retire_seconds)
        ended = [job for job, task in tasks.items() if task.ended]
        for job in ended[: -config.max_ended]:
            if is_known_over(store, job):
                del tasks[job]
        try:
            await retire(store, tasks.keys() - set(ended))
        except FabricError as exc:
            logger.warning("jobs.retire code=%s reason=%s", exc.code, exc.reason)


async def retire(store: JobStore, live: Collection[JobId]) -> None:
    """Close and forget the promises of jobs that are over.

    Args:
        store: Keeps them.
        live: Jobs with a task that may still promise.

    Raises:
        ResourceExhausted: the disk is full; they stay.
    """
    gone: set[JobId] = set()
    specs = store.specs()
    for job in store.promised():
        if store.promise(job) == CLOSED:
            gone |= {job} - specs.keys()
        elif job not in live and is_known_over(store, job):
            await store.close_promise(job)
    if gone:
        await store.forget_promises(frozenset(gone))


async def keep_tidying(
    store: JobStore, tasks: Mapping[JobId, Task], config: JobsConfig, root: Path
) -> None:
    """Remove old scratch directories from time to time until cancelled.

    Args:
        store: Knows what is over.
        tasks: By job.
        config: Periods and bounds.
        root: Holds a directory per job.
    """
    while True:
        await trio.sleep(config.retire_seconds)
        live = {job for job, task in tasks.items() if not task.ended}
        live |= {job for job in store.specs() if not is_known_over(store, job)}
        await trio.to_thread.run_sync(remove_scratch, root, live, config.max_scratch)


def remove_scratch(root: Path, live: Collection[str], keep: int) -> None:
    """Remove the directories in ``root`` of jobs that are not ``live``.

    The last ``keep`` to be changed stay. What cannot be removed is tried again next
    time.
    """
    try:
        over = [path for path in root.iterdir() if path.name not in live]
        over.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    except OSError:  # not made yet, or a directory vanished
        return
    for path in over[keep:]:
        shutil.rmtree(path, ignore_errors=True)
