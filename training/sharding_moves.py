"""Who sends which elements to whom, when gradients are reduced and weights gathered.

Reduction at a level: each rank sends, of what it held, the part that another side now
keeps; who keeps an element gets it from every other side, and adds. Each side's copy of
an element is sent once, or kept.

Gathering goes the other way, level by level, so that the slow links of a level carry
each element once for each side. What travels is an *atom*: the elements of one owner
that go the same way everywhere. It is encoded once, by its owner, and forwarded as
bytes: every rank decodes the same, however many levels lie between.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from training.sharding import (
    DOMAIN,
    GROUP,
    ISLAND,
    WORLD,
    Cut,
    Geometry,
    Line,
    Piece,
    Ranks,
    cells,
    line,
    numel,
    overlap,
    within,
)


class Moves(NamedTuple):
    """What one rank sends and receives in one exchange, by peer; empty parts left out.

    Attributes:
        members: Who takes part, in the order of the exchange.
        sends: Pieces for each peer.
        receives: Pieces from each peer.
    """

    members: Ranks
    sends: dict[int, Cut]
    receives: dict[int, Cut]


def reduction(geometry: Geometry, level: int, rank: int, tensors: range) -> Moves:
    """Return how gradients of some tensors come from ``level - 1`` to ``level``."""
    sides = geometry.nesting.sides(level, rank)
    before, after = geometry.cuts[level - 1], geometry.cuts[level]
    held, kept = within(before[rank], tensors), within(after[rank], tensors)
    sends: dict[int, Cut] = {}
    receives: dict[int, Cut] = {}
    for peer in _others(sides, rank):
        sends[peer] = overlap(held, within(after[peer], tensors))
        receives[peer] = overlap(within(before[peer], tensors), kept)
    members = tuple(peer for side in sides for peer in side)
    return Moves(members, _full(sends), _full(receives))


class Atom(NamedTuple):
    """Elements of one owner that go the same way.

    Attributes:
        owner: Who encodes it.
        pieces: Which elements, in its order.
        holders: For each hop, who holds it after that hop on each side.
    """

    owner: int
    pieces: Cut
    holders: tuple[dict[Ranks, int], ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return numel(self.pieces)


class Hop(NamedTuple):
    """One exchange of a gathering: atoms, by number, for and from each peer."""

    members: Ranks
    sends: dict[int, tuple[int, ...]]
    receives: dict[int, tuple[int, ...]]


class Gathering(NamedTuple):
    """A rank's part in a gathering.

    Attributes:
        atoms: All that it holds at the end; their pieces make up its cut.
        own: Those that it encodes.
        hops: From the outermost level inwards.
    """

    atoms: tuple[Atom, ...]
    own: tuple[int, ...]
    hops: tuple[Hop, ...]


WEIGHT_LEVELS = (DOMAIN, GROUP, ISLAND)
"""Updated weights come from the optimizer's owners to the groups, to the islands."""
GRADIENT_LEVELS = (WORLD, DOMAIN)
"""Gradients summed over the domains come back to each domain."""


def gathering(
    geometry: Geometry, levels: Sequence[int], rank: int, tensors: range
) -> Gathering:
    """Return how some tensors come from ``levels[0]`` down to ``levels[-1]``."""
    atoms = _atoms(geometry, levels, rank, tensors)
    own = tuple(n for n, atom in enumerate(atoms) if atom.owner == rank)
    holding, sources = set(own), [atom.owner for atom in atoms]
    hops = []
    for number, (above, level) in enumerate(pairwise(levels)):
        mine = geometry.nesting.part(level, rank)
        sides = geometry.nesting.sides(above, rank)
        sends: dict[int, list[int]] = {}
        receives: dict[int, list[int]] = {}
        for n, atom in enumerate(atoms):
            after = atom.holders[number]
            if n in holding:
                for side in sides:
                    if side != mine:
                        sends.setdefault(after[side], []).append(n)
            elif after[mine] == rank:
                receives.setdefault(sources[n], []).append(n)
        holding.update(n for numbers in receives.values() for n in numbers)
        sources = [atom.holders[number][mine] for atom in atoms]
        members = tuple(peer for side in sides for peer in side)
        hops.append(Hop(members, _tuples(sends), _tuples(receives)))
    return Gathering(tuple(atoms), own, tuple(hops))


def _atoms(
    geometry: Geometry, levels: Sequence[int], rank: int, tensors: range
) -> list[Atom]:
    """Return the atoms that ``rank`` holds at the last level, in an order all know."""
    whole = geometry.nesting.part(levels[0], rank)
    parts = [
        [part for part in geometry.nesting.parts(level) if part[0] in set(whole)]
        for level in levels[1:]
    ]
    lines = [_line(geometry, levels[0], whole, tensors)]
    for level, sides in zip(levels[1:], parts, strict=True):
        lines += [_line(geometry, level, side, tensors) for side in sides]
    last = 1 + sum(len(sides) for sides in parts[:-1])
    found: dict[Ranks, list[Piece]] = {}
    for piece, holders in cells(lines):
        if rank in holders[last:]:
            found.setdefault(holders, []).append(piece)
    atoms = []
    for holders, pieces in sorted(found.items()):
        rest = iter(holders[1:])
        hops = tuple({side: next(rest) for side in sides} for sides in parts)
        atoms.append(Atom(holders[0], tuple(pieces), hops))
    return atoms


def _line(geometry: Geometry, level: int, ranks: Ranks, tensors: range) -> Line:
    cuts = {rank: within(geometry.cuts[level][rank], tensors) for rank in ranks}
    return line(cuts, ranks)


def _others(sides: Sequence[Ranks], rank: int) -> list[int]:
    return [peer for side in sides if rank not in side for peer in side]


def _full(cuts: dict[int, Cut]) -> dict[int, Cut]:
    return {peer: cut for peer, cut in cuts.items() if cut}


def _tuples(numbers: dict[int, list[int]]) -> dict[int, tuple[int, ...]]:
    return {peer: tuple(found) for peer, found in sorted(numbers.items())}
