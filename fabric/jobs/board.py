"""A job's board: live notes, tags and overrides by several people, seen by all peers.

It is a document of the replicated store, named by the job. Keys:

    note/<milliseconds>   text of a note
    tag/<name>            a tag; the text is empty
    set/<path>            a number, or "null": back to what the spec says

Notes and tags are anybody's who may write documents. Overrides count when their author
submitted the job or is an owner or admin; the last word of these stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from crdt_store.documents.part import Item
from fabric.core.errors import ConfigError, FabricError
from fabric.core.ids import PeerId
from fabric.jobs.messages import MAX_SETTINGS, Setting
from fabric.jobs.spec import JobSpec
from fabric.jobs.steering import STEERABLE, parse_setting

NOTE, TAG, SET = "note/", "tag/", "set/"
BACK_TO_SPEC = "null"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,39}")


@dataclass(frozen=True)
class Override:
    """What somebody set, and whether it holds.

    Attributes:
        item: Path, number and author.
        value: None: back to the spec, or not valid.
        refused: Why it does not count, or empty.
        stands: It is the last word of those that count.
    """

    item: Item
    value: float | None
    refused: str = ""
    stands: bool = False

    @property
    def path(self) -> str:
        """What it sets."""
        return self.item.key.removeprefix(SET)


@dataclass(frozen=True)
class Board:
    """What the document says, read as a board."""

    notes: tuple[Item, ...]
    tags: tuple[Item, ...]
    overrides: tuple[Override, ...]

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What the coordinator puts into the next decision."""
        standing = (o for o in self.overrides if o.stands and o.value is not None)
        return tuple(
            Setting(o.path, o.value, o.item.author)
            for o in standing
            if o.value is not None
        )[:MAX_SETTINGS]


def read_board(
    items: Iterable[Item], spec: JobSpec, may_steer: Callable[[PeerId], bool]
) -> Board:
    """Return the board in ``items``.

    Args:
        items: Of the job's document.
        spec: The job's; its schema judges overrides.
        may_steer: Whose overrides count.
    """
    items = list(items)
    by_time = sorted(items, key=lambda item: item.order)
    judged = [_judge(i, spec, may_steer) for i in by_time if i.key.startswith(SET)]
    last = {override.path: override for override in judged if not override.refused}
    return Board(
        notes=tuple(i for i in by_time if i.key.startswith(NOTE)),
        tags=tuple(i for i in items if i.key.startswith(TAG)),
        overrides=tuple(
            Override(o.item, o.value, o.refused, stands=last.get(o.path) is o)
            for o in judged
        ),
    )


def _judge(item: Item, spec: JobSpec, may_steer: Callable[[PeerId], bool]) -> Override:
    if not may_steer(item.author):
        return Override(item, None, "neither the submitter nor an owner or admin")
    if item.text == BACK_TO_SPEC:
        known = item.key.removeprefix(SET) in STEERABLE
        return Override(item, None, "" if known else "not steerable")
    try:
        value = parse_setting(spec, item.key.removeprefix(SET), item.text)
    except FabricError as exc:
        return Override(item, None, exc.reason)
    return Override(item, value)


def edits_of(
    spec: JobSpec,
    now: int,
    *,
    notes: Sequence[str] = (),
    tags: Sequence[str] = (),
    untags: Sequence[str] = (),
    sets: Sequence[tuple[str, str]] = (),
) -> dict[str, str | None]:
    """Return the edits of the document that these wishes come to.

    Args:
        spec: The job's.
        now: Wall milliseconds; names the notes.
        notes: Texts.
        tags: Names to add.
        untags: Names of our own tags to remove.
        sets: (path, number or "null").

    Raises:
        ConfigError: a tag is no name, or a setting breaks the spec's schema.
    """
    edits: dict[str, str | None] = {}
    for offset, text in enumerate(notes):
        edits[f"{NOTE}{now + offset}"] = text
    for name in (*tags, *untags):
        if not _TAG.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no tag",
                next_step="up to 40 letters, digits and ._:+-",
            )
    edits |= dict.fromkeys((TAG + name for name in tags), "")
    edits |= dict.fromkeys((TAG + name for name in untags), None)
    for path, text in sets:
        if text != BACK_TO_SPEC or path not in STEERABLE:
            text = repr(parse_setting(spec, path, text))
        edits[SET + path] = text
    return edits
