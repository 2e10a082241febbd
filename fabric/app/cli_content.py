"""Verbs about content: add, get, ls; and the checkpoint tool as ``fabric ckpt``."""

from __future__ import annotations

from pathlib import Path

import cyclopts

from checkpoints.cli import app as checkpoint_app
from fabric.app.cli_output import show_json, show_table, show_text
from fabric.app.client import connect


def add(path: Path, *, home: Path | None = None, json: bool = False) -> None:
    """Add a file or directory to the content store; print its root.

    Args:
        path: File or directory of this machine.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    root = connect(home).content_add(path)
    show_json({"root": root}) if json else show_text(root)


def get(root: str, path: Path, *, home: Path | None = None, json: bool = False) -> None:
    """Fetch content from any peers that hold it.

    Args:
        root: What `fabric content add` printed.
        path: Where to write it; must not exist.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    connect(home).content_get(root, path)
    if json:
        show_json({"root": root, "path": str(path)})


def ls(*, home: Path | None = None, json: bool = False) -> None:
    """List the content held here.

    Args:
        home: Directory of the peer to talk to.
        json: Print JSON, a line each.
    """
    rows = connect(home).content()
    if json:
        for row in rows:
            show_json(row)
        return
    show_table(
        ("ROOT", "NAME", "BYTES", "PINNED"),
        ((r.root[:16], r.name, r.bytes, r.pinned) for r in rows),
    )


def add_to(app: cyclopts.App) -> None:
    """Add these verbs to ``app``."""
    content = cyclopts.App(name="content", help="Content addressed by its BLAKE3 root.")
    for verb in (add, get, ls):
        content.command(verb)
    app.command(content)
    app.command(checkpoint_app, name="ckpt")
