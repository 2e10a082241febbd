"""Which tensors have files of their own because they do not change."""

from __future__ import annotations

from collections.abc import Callable

from checkpoints.part_layout import FileLayout, plan_files
from checkpoints.parts import MAX_FILE_BYTES
from checkpoints.torch_io.pieces import Held
from checkpoints.torch_io.save_agreement import Planned
from checkpoints.torch_io.staging import Staged

MIN_FROZEN_BYTES = 1 << 20
"""Unchanged tensors get files of their own above this: the block is the unit."""


class FileGroups:
    """The files of one rank: what changes, and what does not, apart.

    A tensor is taken for frozen if the caller says so, or when no byte of it changed
    between two saves. One that changes after all is never taken for frozen again.

    Args:
        writer: Stem of the file names.
        hint: Says of a name whether its tensor is not expected to change.
        max_file_bytes: Start another file above this.
    """

    def __init__(
        self,
        writer: str,
        hint: Callable[[str], bool],
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._writer = writer
        self._hint = hint
        self._max_file_bytes = max_file_bytes
        self._still: set[str] = set()
        self._thawed: set[str] = set()
        self._last: tuple[object, list[FileLayout]] = (None, [])

    def layouts(self, planned: Planned, held: dict[str, Held]) -> list[FileLayout]:
        """Return the files; the same object as before while nothing changed."""
        names = {item.name for item in planned.mine.items}
        still = {name for name in names if name in self._still or self._hint(name)}
        still -= self._thawed
        key = (planned.key, still)
        if self._last[0] != key:
            chunks = [held[i.name].chunk(i.name, i.box) for i in planned.mine.items]
            files = plan_files(
                self._writer,
                chunks,
                frozen=still,
                max_file_bytes=self._max_file_bytes,
            )
            self._last = (key, files)
        return self._last[1]

    def learn(self, staged: Staged) -> None:
        """Take what did not change for frozen from now on, and what did for not."""
        for file in staged.files:
            if "-frozen-" in file.layout.name and staged.compared:
                names = {chunk.plan.name for chunk in file.layout.chunks}
                self._thawed |= names - staged.unchanged
        still = staged.unchanged - self._thawed - self._still
        size = sum(
            chunk.plan.size
            for file in staged.files
            for chunk in file.layout.chunks
            if chunk.plan.name in still
        )
        if size >= MIN_FROZEN_BYTES:
            self._still |= still
