"""Where the parts of a rule lie in their whole: boxes and axes, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from checkpoints.boxes import Box, Index
from checkpoints.model_numbers import ModelNumbers
from checkpoints.name_maps import Rule
from checkpoints.views import NEW_AXIS
from fabric.core.errors import ConfigError


class Link(NamedTuple):
    """Elements that a part and the whole share.

    Attributes:
        place: The part's place along the stacked axes.
        part: Its number in the rule.
        part_box: The elements in the part.
        whole_box: The same in the whole.
        axes: For each axis of the whole that of the part, or NEW_AXIS (stacked).
    """

    place: Index
    part: int
    part_box: Box
    whole_box: Box
    axes: tuple[int, ...]


def links_of(
    rule: Rule, shapes: Sequence[Index], stack: Index, groups: int
) -> tuple[Index, list[Link]]:
    """Return the shape of a whole, and how its parts lie in it.

    Args:
        rule: Says whether it is turned.
        shapes: Of each part; the same for all places along the stacked axes.
        stack: Extents of the stacked axes.
        groups: Number of groups of rows that are interleaved.

    Raises:
        ConfigError: the shapes do not fit together (``E_MAP_SHAPE``).
    """
    first = shapes[0]
    if any(shape[1:] != first[1:] or not shape for shape in shapes[1:]):
        raise _bad(rule, f"shapes {[list(shape) for shape in shapes]} do not fit")
    if not first:
        inner: Index = ()
    else:
        rows = sum(shape[0] for shape in shapes)
        inner = (rows, *first[1:])
        if len(shapes) == 1:
            groups = 1
        if any(shape[0] % groups for shape in shapes):
            raise _bad(rule, f"{[s[0] for s in shapes]} rows in {groups} groups")
    turned = rule.turned and len(inner) == 2
    axes = (1, 0) if turned else tuple(range(len(inner)))
    links = [
        Link(
            index,
            part,
            box,
            _placed(index, row, box, turned=turned),
            (NEW_AXIS,) * len(stack) + axes,
        )
        for part, row, box in _rows(shapes, groups)
        for index in indices(stack)
    ]
    return (*stack, *(inner[::-1] if turned else inner)), links


def _rows(shapes: Sequence[Index], groups: int) -> Iterator[tuple[int, int, Box]]:
    """Yield part, first row in the whole, and box in the part, of each group."""
    if not shapes[0]:
        yield 0, 0, Box((), ())
        return
    row = 0
    for group in range(groups):
        for part, shape in enumerate(shapes):
            count = shape[0] // groups
            zeros = (0,) * (len(shape) - 1)
            yield part, row, Box((group * count, *zeros), (count, *shape[1:]))
            row += count


def _placed(index: Index, row: int, box: Box, *, turned: bool) -> Box:
    """Return where a part's box lies in the whole."""
    if not box.sizes:
        return Box(index, (1,) * len(index))
    offsets, sizes = (row, *box.offsets[1:]), box.sizes
    if turned:
        offsets, sizes = offsets[::-1], sizes[::-1]
    return Box((*index, *offsets), ((1,) * len(index)) + sizes)


def indices(stack: Index) -> Iterator[Index]:
    """Yield every place along the stacked axes; one if there are none."""
    if not stack:
        yield ()
        return
    for first in range(stack[0]):
        for rest in indices(stack[1:]):
            yield (first, *rest)


def rows_of(rule: Rule, inner: Index, numbers: ModelNumbers, name: str) -> list[int]:
    """Return how many rows of a whole each part has.

    Args:
        rule: May name them; else they are equal.
        inner: Shape of the whole without stacked axes, not turned.
        numbers: The model's.
        name: The whole's, for messages.

    Raises:
        ConfigError: they are not the whole's (``E_MAP_SHAPE``).
    """
    if not inner:
        return [0] * len(rule.parts)
    total = inner[0]
    if rule.crop:
        wanted = numbers.value(rule.crop)
        if wanted > total:
            raise _bad(rule, f"{name!r} has {total} rows, {rule.crop} is {wanted}")
        return [wanted]
    if not rule.rows:
        share, rest = divmod(total, len(rule.parts))
        if rest:
            raise _bad(rule, f"{name!r}: {total} rows for {len(rule.parts)} parts")
        return [share] * len(rule.parts)
    rows = [numbers.value(formula) for formula in rule.rows]
    if sum(rows) != total:
        raise _bad(rule, f"{name!r} has {total} rows, the config says {rows}")
    return rows


def _bad(rule: Rule, reason: str) -> ConfigError:
    return ConfigError(
        f"{rule.parts[0]}: {reason}",
        code="E_MAP_SHAPE",
        next_step="is the config this model's? name another with --config",
    )
