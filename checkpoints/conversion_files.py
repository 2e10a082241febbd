"""Write the planned files side by side, and read the result again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import TypeVar

from blake3 import blake3

from checkpoints.boxes import Box, tiling_fault, whole
from checkpoints.conversion_bundle import HashedBox, Meter, ReaderPool, Stopped
from checkpoints.conversion_journal import Journal, WholeFile
from checkpoints.directories import disk_errors
from checkpoints.formats.sink import Bundle, OutTensor, Plan, PlannedFile
from checkpoints.formats.source import Source
from checkpoints.hashed_file import Buffer, HashedFile
from checkpoints.views import view_of
from checkpoints.write_behind import WriteBehind
from fabric.core.errors import IntegrityError, LocalProtocolError

T = TypeVar("T")


def write_files(
    plan: Plan, directory: Path, journal: Journal, meter: Meter, workers: int
) -> dict[str, WholeFile]:
    """Write what the journal lacks, and return all files by path.

    Raises:
        ResourceExhausted: the disk is full.
        IntegrityError: the source is damaged.
    """
    done = dict(journal.whole)
    todo = [each for each in plan.files if each.path not in done]
    behind = len(todo) < workers  # a thread for each file leaves cores idle

    def write(planned: PlannedFile) -> None:
        meter.begin_file()
        path = directory / _safe(planned.path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with HashedFile(path, hashed=plan.hashes) as file:
                _fill(file, planned.chunks(), behind=behind)
                entry = file.finish()
        kept = entry if plan.hashes else None
        each = WholeFile(planned.path, entry.size, kept, meter.hashed())
        journal.add(each)
        done[planned.path] = each

    todo.sort(key=lambda each: -each.size_bytes)
    side_by_side(write, todo, workers, meter)
    return done


def _fill(file: HashedFile, chunks: Iterable[Buffer], *, behind: bool) -> None:
    if not behind:
        for chunk in chunks:
            file.write(chunk)
        return
    with WriteBehind(file) as writer:
        for chunk in chunks:
            writer.write(chunk)
        writer.drain()


def side_by_side(
    work: Callable[[T], None], items: Iterable[T], workers: int, meter: Meter
) -> None:
    """Call ``work`` on all items in threads; a failure ends all and is raised."""
    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:

        def guarded(item: T) -> None:
            try:
                work(item)
            except BaseException:
                meter.stop.set()
                raise

        futures = [pool.submit(guarded, item) for item in items]
        try:
            wait(futures)
        except BaseException:
            meter.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    errors = [error for each in futures if (error := each.exception()) is not None]
    errors.sort(key=lambda error: isinstance(error, Stopped))
    if errors:
        raise errors[0]


def _safe(path: str) -> PurePosixPath:
    """Return a path that stays in the directory; names of tensors may be in it."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
        raise IntegrityError(
            f"{path[:200]!r} would leave the target's directory",
            code="E_PATH",
            next_step="the source names a tensor so: do not use it",
        )
    return pure


def compare(
    opened: Source,
    bundle: Bundle,
    plan: Plan,
    files: Mapping[str, WholeFile],
    meter: Meter,
    *,
    workers: int,
    window_bytes: int,
) -> dict[str, list[HashedBox]]:
    """Read the whole target and compare it with what was read of the source.

    Returns:
        What was compared of each tensor.

    Raises:
        IntegrityError: a tensor is missing, or differs in type, shape or one bit.
    """
    hashed = _by_tensor(files, bundle)
    left_out = {each.name for each in plan.ignored}
    expected = {
        name: name
        for name in bundle.tensors
        if name not in left_out and name not in plan.tied
    }
    expected |= {
        name: target for name, target in bundle.aliases.items() if name not in left_out
    }
    for name, target in plan.tied.items():
        expected[name] = bundle.aliases.get(target, target)
    # a config may tie a name that the source did not have at all
    implied = {n for n, target in opened.aliases.items() if target in expected}
    found = set(opened.names()) - (implied - expected.keys())
    if found != expected.keys():
        wrong = sorted(found ^ expected.keys())
        raise _differs(f"{len(wrong)} tensors are missing or new: {wrong[:5]}")
    todo: list[tuple[str, HashedBox]] = []
    for name, target in expected.items():
        _check_type(opened, name, bundle.tensors[target])
        stored_as = opened.aliases.get(name, name)
        if stored_as == name or expected.get(stored_as) != target:
            todo += [(name, each) for each in hashed[target]]
    pool = ReaderPool(opened)

    def check(item: tuple[str, HashedBox]) -> None:
        name, wanted = item
        if _hash(pool, name, wanted.box, meter, window_bytes) != wanted.blake3:
            raise _differs(f"{name!r} differs from the source when read again")

    try:
        side_by_side(check, todo, workers, meter)
    finally:
        pool.close()
    return hashed


def _hash(
    pool: ReaderPool, name: str, box: Box, meter: Meter, window_bytes: int
) -> str:
    view = view_of(name, pool.source().entry(name))
    hasher = blake3()
    for window in pool.reader().windows(view, box, window_bytes):
        hasher.update(window)
        meter.advance(len(window))
    return hasher.hexdigest()


def _by_tensor(
    files: Mapping[str, WholeFile], bundle: Bundle
) -> dict[str, list[HashedBox]]:
    """Return the hashed boxes of each tensor, which tile it."""
    found: dict[str, dict[Box, HashedBox]] = defaultdict(dict)
    for file in files.values():
        for each in file.hashed:
            found[each.name].setdefault(each.box, each)
    result: dict[str, list[HashedBox]] = defaultdict(list)
    for name, boxes in found.items():
        shape = bundle.tensors[name].shape
        complete = boxes.get(whole(shape))
        if complete is not None:
            result[name] = [complete]
            continue
        result[name] = [boxes[box] for box in sorted(boxes)]
        if tiling_fault(shape, (box for box in boxes if box.volume)) is not None:
            raise LocalProtocolError(f"{name!r} was not written whole")
    return result


def _check_type(opened: Source, name: str, wanted: OutTensor) -> None:
    entry = opened.entry(name)
    if (entry.dtype, entry.shape) != (wanted.dtype, wanted.shape):
        raise _differs(
            f"{name!r} is {entry.dtype} {list(entry.shape)}, not {wanted.dtype} "
            f"{list(wanted.shape)}"
        )


def _differs(reason: str) -> IntegrityError:
    return IntegrityError(
        f"the target was read again: {reason}",
        code="E_VERIFY",
        next_step="check the disk and memory of this machine; convert again",
    )


def files_of(plan: Plan) -> Mapping[str, Sequence[str]]:
    """Return which files hold each tensor."""
    found: dict[str, list[str]] = defaultdict(list)
    for each in plan.files:
        for name in each.tensors:
            found[name].append(each.path)
    return found
