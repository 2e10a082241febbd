"""The verb ``fetch`` of ``fabric-ckpt``: a checkpoint from the mesh. Needs a daemon.

The other verbs of the tool work without one, so this one stands apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts

from checkpoints.cli_output import size_text
from fabric.app.cli_content import told
from fabric.app.cli_output import show_json, show_text
from fabric.app.client import connect


def fetch(
    root: str,
    target: Path,
    *,
    only: Annotated[tuple[str, ...], cyclopts.Parameter(negative="")] = (),
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Fetch a checkpoint from any peers that hold it, through the running daemon.

    With --only, just the blocks that the named tensors lie in are fetched, and the
    target is a checkpoint of its own: these tensors, the whole state, and the
    checkpoint they are from as its parent. What an interrupted fetch got is kept.

    Args:
        root: Content root: `fabric jobs --json` and `fabric content ls` show it.
        target: New directory: the step.
        only: Names of tensors, with * and ?: --only 'model/*'; may be given again.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    client = connect(home)
    with told(client, root, quiet=json):
        fetched = client.checkpoint_fetch(root, target, only)
    if json:
        show_json(fetched)
        return
    show_text(
        f"{fetched.path}: step {fetched.step}, {fetched.tensors} tensors, "
        f"root {fetched.root}"
    )
    needed, total = size_text(fetched.needed_bytes), size_text(fetched.total_bytes)
    show_text(f"took {needed} of {total}")
