"""Where weights, gradients and optimizer states lie: nested partitions of one model.

Every rank is in an *island*, every island in a *group*, every group in a *domain*::

    domains (d_o)   |---------------------------|---------------|
    groups  (d_g)   |-------------|-------------|---------------|
    islands (d_w)   |-----|-------|------|------|-----|----|----|

An island holds the weights once, cut as FSDP2 cuts them: each tensor by rows, the
first ranks one row more. A group holds the gradients once, a domain the optimizer
states once, and the world reduces gradients between domains. Sizes need not divide,
and islands, groups and domains of one run may differ in size.

Rule: a rank's cut of a level lies inside its cut of the level before. So what a rank
reduces or sends is always part of what it holds, and every closed form of
:mod:`training.sharding_bytes` follows. The cuts of the sides that meet (the islands of
a group) have different edges; between two edges of any of them lies a *cell*, which
each side holds in one rank. :func:`refine` cuts each cell between the sides by their
numbers of ranks, so a rank's part is the same share of each cell it holds: 1 / d_g of
the model, to a rounding of one element for each cell.

Source: three levels of partitioning as in arXiv:2501.04266, for any sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import msgspec

from fabric.core.errors import ConfigError

Ranks = tuple[int, ...]


class Piece(NamedTuple):
    """Elements ``begin .. end`` of a flattened tensor."""

    tensor: int
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.end - self.begin


Cut = tuple[Piece, ...]
"""What one rank holds, in the order of tensors; pieces do not overlap."""
Cuts = Mapping[int, Cut]
"""Cuts by rank."""


class Nesting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who holds what together; each level's sets are unions of those of the last.

    Attributes:
        islands: Ranks that hold the weights once.
        groups: Ranks that hold the gradients once.
        domains: Ranks that hold the optimizer states once.
    """

    islands: tuple[Ranks, ...]
    groups: tuple[Ranks, ...]
    domains: tuple[Ranks, ...]

    @property
    def world(self) -> Ranks:
        """All ranks."""
        return tuple(sorted(rank for domain in self.domains for rank in domain))

    def check(self) -> None:
        """Refuse sets that do not nest.

        Raises:
            ConfigError: see above.
        """
        levels = (self.islands, self.groups, self.domains)
        world = list(range(len(self.world)))
        for level in levels:
            if sorted(rank for part in level for rank in part) != world:
                raise ConfigError(
                    f"{level} are not the ranks 0 .. {len(world) - 1}, each once",
                    code="E_NESTING",
                )
        for fine, coarse in pairwise(levels):
            for part in fine:
                if not set(part) <= set(_of(coarse, part[0])):
                    raise ConfigError(
                        f"{part} is not inside one of {coarse}",
                        code="E_NESTING",
                        next_step="let groups be unions of islands, domains of groups",
                    )

    def parts(self, level: int) -> tuple[Ranks, ...]:
        """Return the islands, groups, domains, or the world as the only part."""
        return (self.islands, self.groups, self.domains, (self.world,))[level]

    def part(self, level: int, rank: int) -> Ranks:
        """Return the part of a level that a rank is in."""
        return _of(self.parts(level), rank)

    def sides(self, level: int, rank: int) -> tuple[Ranks, ...]:
        """Return the finer parts that meet in a rank's part of a level.

        GROUP: the islands of its group; DOMAIN: the groups of its domain; WORLD: the
        domains. Each of them holds everything once.
        """
        whole = set(self.part(level, rank))
        return tuple(part for part in self.parts(level - 1) if part[0] in whole)


ISLAND, GROUP, DOMAIN, WORLD = range(4)
"""Levels: weights, gradients, optimizer states, and the sum over the domains."""


def nest(world: int, d_w: int, d_g: int, d_o: int) -> Nesting:
    """Cut ``world`` ranks into domains of d_o, those into groups, those into islands.

    Where a degree does not divide, the last set is smaller.

    Raises:
        ConfigError: not 1 <= d_w <= d_g <= d_o <= world.
    """
    if not 1 <= d_w <= d_g <= d_o <= world:
        raise ConfigError(
            f"degrees {d_w}, {d_g}, {d_o} of {world} ranks do not nest",
            code="E_NESTING",
            next_step="choose 1 <= d_w <= d_g <= d_o <= ranks",
        )
    domains = _chop(tuple(range(world)), d_o)
    groups = tuple(part for domain in domains for part in _chop(domain, d_g))
    islands = tuple(part for group in groups for part in _chop(group, d_w))
    return Nesting(islands, groups, domains)


class Geometry:
    """The cuts of every rank at every level.

    Args:
        shapes: Of the tensors, in the order of the flat space.
        nesting: Who holds what together.

    Attributes:
        cuts: For ISLAND, GROUP, DOMAIN, WORLD: what each rank holds there. WORLD is
            the part of its optimizer states whose gradient it sums over the domains.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], nesting: Nesting) -> None:
        nesting.check()
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.nesting = nesting
        weights: dict[int, Cut] = {}
        for island in nesting.islands:
            weights |= zip(island, rows(self.shapes, len(island)), strict=True)
        self.cuts: list[Cuts] = [weights]
        for level in (GROUP, DOMAIN, WORLD):
            self.cuts.append(self._refined(level))

    def _refined(self, level: int) -> Cuts:
        last = self.cuts[-1]
        found: dict[int, Cut] = {}
        for rank in self.nesting.world:
            if rank not in found:
                found |= refine(last, self.nesting.sides(level, rank))
        return found

    def held(self, level: int, rank: int) -> int:
        """Return how many elements a rank holds at a level."""
        return numel(self.cuts[level][rank])


def rows(shapes: Sequence[tuple[int, ...]], parts: int) -> list[Cut]:
    """Return the cut of each of ``parts`` ranks: whole rows, as FSDP2 has them."""
    cuts: list[list[Piece]] = [[] for _ in range(parts)]
    for tensor, shape in enumerate(shapes):
        inner = prod(shape[1:])
        step = -(-shape[0] // parts)
        for part in range(parts):
            begin = min(part * step, shape[0])
            end = min(begin + step, shape[0])
            if end > begin and inner:
                cuts[part].append(Piece(tensor, begin * inner, end * inner))
    return [tuple(cut) for cut in cuts]


def refine(cuts: Cuts, sides: Sequence[Ranks]) -> dict[int, Cut]:
    """Cut what several sides hold alike between them, in proportion to their sizes.

    Args:
        cuts: What each rank holds; the ranks of each side hold everything once.
        sides: Ranks of each.

    Returns:
        By rank: a part of its cut; all parts together hold everything once.
    """
    if len(sides) == 1:
        return {rank: cuts[rank] for rank in sides[0]}
    edges = [0, *accumulate(len(side) for side in sides)]
    total = edges[-1]
    found: dict[int, list[Piece]] = {rank: [] for side in sides for rank in side}
    for piece, holders in cells([line(cuts, side) for side in sides]):
        for number, holder in enumerate(holders):
            begin = piece.begin + piece.numel * edges[number] // total
            end = piece.begin + piece.numel * edges[number + 1] // total
            if end > begin:
                found[holder].append(Piece(piece.tensor, begin, end))
    return {rank: tuple(pieces) for rank, pieces in found.items()}


Line = list[tuple[Piece, int]]
"""Pieces that hold everything once, in order, and who has each."""


def line(cuts: Cuts, ranks: Ranks) -> Line:
    """Return the cuts of some ranks side by side."""
    return sorted((piece, rank) for rank in ranks for piece in cuts[rank])


def cells(lines: Sequence[Line]) -> Iterator[tuple[Piece, Ranks]]:
    """Yield what lies between any two edges, and who holds it in each line."""
    places = [0] * len(lines)
    while places[0] < len(lines[0]):
        heads = [each[place] for each, place in zip(lines, places, strict=True)]
        begin = max(piece.begin for piece, _ in heads)
        end = min(piece.end for piece, _ in heads)
        holders = tuple(rank for _, rank in heads)
        yield Piece(heads[0][0].tensor, begin, end), holders
        for number, (piece, _) in enumerate(heads):
            places[number] += piece.end == end


def overlap(a: Iterable[Piece], b: Iterable[Piece]) -> Cut:
    """Return what is in both cuts."""
    found: list[Piece] = []
    ours, theirs = list(a), list(b)
    i = j = 0
    while i < len(ours) and j < len(theirs):
        mine, other = ours[i], theirs[j]
        if mine.tensor == other.tensor:
            begin, end = max(mine.begin, other.begin), min(mine.end, other.end)
            if begin < end:
                found.append(Piece(mine.tensor, begin, end))
        if (mine.tensor, mine.end) <= (other.tensor, other.end):
            i += 1
        else:
            j += 1
    return tuple(found)


def within(cut: Cut, tensors: range) -> Cut:
    """Return the pieces of some tensors that follow each other."""
    return tuple(piece for piece in cut if piece.tensor in tensors)


def numel(cut: Iterable[Piece]) -> int:
    """Return the number of elements."""
    return sum(piece.end - piece.begin for piece in cut)


def _chop(ranks: Ranks, size: int) -> tuple[Ranks, ...]:
    return tuple(ranks[at : at + size] for at in range(0, len(ranks), size))


def _of(parts: Sequence[Ranks], rank: int) -> Ranks:
    return next(part for part in parts if rank in part)
