"""The one place where what sockets and streams raise becomes an error of ours.

A caller of the Host, of RPC or of the data plane catches :class:`FabricError` and
nothing else: a connection that breaks is somebody's answer, not a bug.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from fabric.core.errors import Unavailable
from fabric.net.tasks import collapse_group

BROKEN: tuple[type[Exception], ...] = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)
"""What trio and the kernel raise when a connection ends or cannot be had."""


@contextmanager
def network_errors(
    what: str, broken: tuple[type[Exception], ...] = BROKEN
) -> Iterator[None]:
    """Raise those of ``broken`` as Unavailable, also one in a nursery's group.

    Args:
        what: Begins the reason: "no stream to ...".
        broken: Our errors, time-outs, cancellations and bugs pass as they are.

    Raises:
        Unavailable: its cause is what happened.
    """
    try:
        with collapse_group():
            yield
    except broken as exc:
        raise Unavailable(f"{what}: {str(exc) or type(exc).__name__}") from exc
