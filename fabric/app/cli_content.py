"""Verbs about content: add, get, ls; and the checkpoint tool as ``fabric ckpt``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cyclopts

from checkpoints.cli import app as checkpoint_app
from checkpoints.cli import mount_verbs
from dht.progress import Progress
from fabric.app.cli_output import show_json, show_table, show_text, talk
from fabric.app.client import Client, connect
from fabric.app.content_messages import ContentRow
from fabric.core.errors import FabricError

TELL_SECONDS = 1.0


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
    client = connect(home)
    with told(client, root, quiet=json):
        client.content_get(root, path)
    if json:
        show_json({"root": root, "path": str(path)})


@contextmanager
def told(client: Client, root: str, *, quiet: bool) -> Iterator[None]:
    """Tell how far the fetch of ``root`` is, while the block lasts.

    Only where somebody watches: stderr is a terminal.
    """
    over = threading.Event()

    def tell() -> None:
        said = ""
        while not over.wait(TELL_SECONDS):
            with suppress(FabricError):  # the fetch itself says why
                text = progress_text(client.content_progress(root))
                if text != said:
                    talk(text)
                    said = text

    teller = threading.Thread(target=tell, daemon=True)
    if sys.stderr.isatty() and not quiet:
        teller.start()
    try:
        yield
    finally:
        over.set()


def progress_text(progress: Progress) -> str:
    """Return how far a fetch is, for people."""
    if not progress.num_blocks:
        return "looking for a peer that holds it"
    text = f"{progress.num_held} of {progress.num_blocks} blocks"
    if progress.num_sources:
        return f"{text}, from {progress.num_sources} peers"
    return f"{text}; waiting for a holder since {progress.waited_seconds:.0f} s"


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
        ("ROOT", "NAME", "BYTES", "PINNED", "COPIES"),
        ((r.root[:16], r.name, r.bytes, r.pinned, copies_text(r)) for r in rows),
    )


def copies_text(row: ContentRow) -> str | None:
    """Return how many copies of a checkpoint there are, of those that should be."""
    if not row.wanted:
        return None
    return f"{row.copies if row.copies >= 0 else '?'}/{row.wanted}"


def pin(root: str, *, home: Path | None = None, json: bool = False) -> None:
    """Keep content that is here, whatever else is removed.

    Args:
        root: Content root.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    connect(home).content_pin(root)
    if json:
        show_json({"root": root, "pinned": True})


def unpin(root: str, *, home: Path | None = None, json: bool = False) -> None:
    """Let content be removed when the store needs room, or its run moved on.

    Args:
        root: Content root.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    connect(home).content_pin(root, pinned=False)
    if json:
        show_json({"root": root, "pinned": False})


def add_to(app: cyclopts.App) -> None:
    """Add these verbs to ``app``."""
    content = cyclopts.App(name="content", help="Content addressed by its BLAKE3 root.")
    for verb in (add, get, ls, pin, unpin):
        content.command(verb)
    app.command(content)
    mount_verbs()
    app.command(checkpoint_app, name="ckpt")
