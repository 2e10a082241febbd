"""What a person is told of a bug of ours: the innermost causes, and the log's place."""

from __future__ import annotations

import logging
import os
import secrets
import stat

import trio

from fabric.app.control_client import failed_of
from fabric.app.control_messages import Failed
from fabric.core.errors import FabricError, PeerTimeout
from fabric.net.tasks import leaves

log = logging.getLogger(__name__)

MAX_CAUSES = 3
"""Causes named to the person; the log has all."""
_STDERR = 2


def refusal_of(error: Exception) -> FabricError | None:
    """Return the refusal that ``error`` is or wraps, None if it holds a bug.

    A nursery wraps what leaves it in a group; whoever waits for an answer must still
    get the refusal that was meant.
    """
    found: list[FabricError] = []
    for cause in leaves(error):
        if isinstance(cause, trio.TooSlowError):
            found.append(PeerTimeout("the peers did not answer in time"))
        elif isinstance(cause, FabricError):
            found.append(cause)
        else:
            return None
    return found[0] if found else None


def answer_to(error: Exception, verb: str) -> Failed:
    """Return what a client is told of ``error``; a bug is logged under an id.

    Args:
        error: What left the handler.
        verb: What was asked for.
    """
    refusal = refusal_of(error)
    if refusal is not None:
        return failed_of(refusal)
    bug = secrets.token_hex(4)
    log.error("control.bug id=%s verb=%s", bug, verb, exc_info=error)
    named = list(dict.fromkeys(f"{type(c).__name__}: {c}" for c in leaves(error)))
    more = len(named) - MAX_CAUSES
    reason = "; ".join(named[:MAX_CAUSES]) + (f" and {more} more" if more > 0 else "")
    return Failed(
        "E_BUG",
        f"a bug in {verb}: {reason}",
        f"the traceback is in {log_place()} under id={bug}; report it with that",
    )


def log_place() -> str:
    """Return where this process' log can be read, for people.

    It goes to stderr, which may be a file, a terminal or a service's journal.
    """
    if os.environ.get("JOURNAL_STREAM"):  # systemd.exec(5)
        return f"the journal (`journalctl _PID={os.getpid()}`)"
    try:
        mode = os.fstat(_STDERR).st_mode
        name = os.readlink(f"/proc/self/fd/{_STDERR}")
    except OSError:
        return "the daemon's stderr"
    if stat.S_ISREG(mode):
        return name
    if os.isatty(_STDERR):
        return f"the terminal of `fabric up` ({name})"
    return "the daemon's stderr"
