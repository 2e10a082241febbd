"""The verb ``fabric board``: notes, tags and live settings of a job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import cyclopts

from fabric.app.board_messages import BoardView, OverrideView
from fabric.app.cli_output import show_json, show_text
from fabric.app.client import connect
from fabric.core.errors import ConfigError

_Many = cyclopts.Parameter(negative="")


def board(
    job: str,
    *,
    note: Annotated[tuple[str, ...], _Many] = (),
    tag: Annotated[tuple[str, ...], _Many] = (),
    untag: Annotated[tuple[str, ...], _Many] = (),
    set: Annotated[tuple[str, ...], _Many] = (),
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Show a job's board; first add what is given.

    Everybody in the mesh sees it. Settings change the running job at its next round;
    they are the submitter's, owners' and admins' to change.

    Args:
        job: Job id or its beginning.
        note: Text to leave.
        tag: Name to put on the job.
        untag: Tag of yours to take away.
        set: A setting as path=number, e.g. --set train.learning_rate=0.001; path=null
            goes back to what was submitted.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    row = connect(home).job(job)
    if note or tag or untag or set:
        view = row.write_board(
            notes=note, tags=tag, untags=untag, set=dict(map(_pair, set))
        )
    else:
        view = row.board()
    show_json(view) if json else show_text(text_of(view))


def _pair(text: str) -> tuple[str, str]:
    path, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(
            f"{text!r} is not path=number", next_step="--set train.learning_rate=0.001"
        )
    return path.strip(), value.strip()


def text_of(view: BoardView) -> str:
    """Return the board for people."""
    lines = [f"job {view.job[:8]}"]
    if view.tags:
        names = dict.fromkeys(tag.text for tag in view.tags)
        lines.append("tags  " + ", ".join(names))
    lines += [f"{_when(o.time)} {o.name}: {_setting(o)}" for o in view.overrides]
    lines += [f"{_when(n.time)} {n.name}: {n.text}" for n in view.notes]
    return "\n".join(lines)


def _setting(override: OverrideView) -> str:
    value = "as submitted" if override.value is None else f"{override.value:g}"
    if override.refused:
        return f"{override.path} does not count: {override.refused}"
    return f"{override.path} = {value}" + ("" if override.stands else " (overruled)")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def add_to(app: cyclopts.App) -> None:
    """Add this verb to ``app``."""
    app.command(board)
