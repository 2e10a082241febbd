"""A job's board at this peer: read it, and write our own part of it."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from crdt_store.documents.part import Item
from crdt_store.roles import Role
from crdt_store.service import Store
from fabric.app import control_messages as m
from fabric.app.board_messages import BoardLine, BoardView, OverrideView
from fabric.app.peer_names import name_of
from fabric.core.errors import RemoteRefused
from fabric.core.ids import JobId, PeerId
from fabric.jobs.board import Board, Override, edits_of, read_board
from fabric.jobs.spec import JobSpec
from fabric.jobs.submission import read_spec_untrusted

if TYPE_CHECKING:
    from fabric.app.session import Session

STEERING_ROLES = frozenset({Role.OWNER, Role.ADMIN})
"""Whose overrides count besides the submitter's."""


def may_steer(store: Store, spec: JobSpec, peer: PeerId) -> bool:
    """Return whether overrides of ``peer`` count: it is a member, and the job's."""
    role = store.authority.role_of(peer)
    return role is not None and (peer == spec.submitter or role in STEERING_ROLES)


def board_of(store: Store, job: JobId, spec: JobSpec) -> Board:
    """Return what people wrote on the job's board."""
    return read_board(store.documents.read(job), spec, partial(may_steer, store, spec))


async def edit_board(session: Session, job: JobId, edit: m.BoardEdit) -> None:
    """Write on the job's board; return once that is on disk.

    Raises:
        ConfigError: a setting or tag breaks a rule.
        RemoteRefused: this peer may not steer the job, or not write documents.
        ResourceExhausted: our part of the board is full.
    """
    store, spec = session.store, _spec(session.store, job)
    edits = edits_of(
        spec,
        int(time.time() * 1000),
        notes=edit.notes,
        tags=edit.tags,
        untags=edit.untags,
        sets=tuple(edit.sets.items()),
    )
    if edit.sets and not may_steer(store, spec, session.own):
        raise RemoteRefused(
            "only the submitter of a job, an owner or an admin may change its settings",
            code="E_NOT_AUTHORISED",
            next_step="leave a --note, or ask an owner",
        )
    if edits:
        await store.documents.edit(job, edits)


def board_view(session: Session, job: JobId) -> BoardView:
    """Return the board with the names of its authors."""
    board = board_of(session.store, job, _spec(session.store, job))
    return BoardView(
        job=job,
        notes=tuple(_line(session, note, note.text) for note in board.notes),
        tags=tuple(
            _line(session, tag, tag.key.partition("/")[2]) for tag in board.tags
        ),
        overrides=tuple(_override(session, each) for each in board.overrides),
    )


def _spec(store: Store, job: JobId) -> JobSpec:
    return read_spec_untrusted(job, store.jobs.spec(job) or b"")


def _line(session: Session, item: Item, text: str) -> BoardLine:
    return BoardLine(item.author, name_of(session, item.author), item.at / 1000, text)


def _override(session: Session, override: Override) -> OverrideView:
    item = override.item
    return OverrideView(
        peer=item.author,
        name=name_of(session, item.author),
        time=item.at / 1000,
        path=override.path,
        value=override.value,
        stands=override.stands,
        refused=override.refused,
    )
