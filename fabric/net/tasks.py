"""What every context manager that owns a nursery ends with.

A trio nursery wraps what leaves it in an ``ExceptionGroup``, even a single exception
and even the caller's own. A caller of ``async with open_x() as x:`` must get its
``KeyError`` back as a ``KeyError``; :func:`collapse_group` does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


@contextmanager
def collapse_group() -> Iterator[None]:
    """Re-raise the one exception a group holds, as itself.

    A group of several errors stays a group. ``trio.Cancelled`` beside a real error is
    the nursery's own doing and is dropped.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        error = _sole_error(group)
        if error is None:
            raise
        # the group adds nothing: keep the error's own cause and context
        raise error from error.__cause__


def _sole_error(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """Return the only real error in ``group``, or None if there are several."""
    found = list(leaves(group))
    errors = [leaf for leaf in found if not isinstance(leaf, trio.Cancelled)]
    if len(errors) == 1:
        return errors[0]
    return found[0] if len(found) == 1 else None


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield what ``error`` is about: itself, or the innermost members of a group."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
