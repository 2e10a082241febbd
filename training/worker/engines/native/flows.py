"""Beyond the island: gradients on their way out, updated weights on their way back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import torch

from training.sharding import (
    DOMAIN,
    GROUP,
    ISLAND,
    WORLD,
    Cut,
    Geometry,
    Piece,
    within,
)
from training.sharding_bytes import Form, Wires, encoded_bytes
from training.sharding_moves import (
    GRADIENT_LEVELS,
    WEIGHT_LEVELS,
    Gathering,
    Moves,
    gathering,
    reduction,
)
from training.worker.engines.native.codec import QUANTISED, decode, encode
from training.worker.engines.native.lanes import Groups, Lane, Ledger
from training.worker.engines.native.pipeline import Stages
from training.worker.engines.native.space import (
    Places,
    Space,
    add,
    packed,
    put,
    spans,
    take,
)

Sums = Generator[None, None, None]


class Lanes:
    """One lane per level.

    Args:
        groups: The process groups.
        geometry: Where levels have only one side, nobody sends.
        ledger: Counts.
    """

    def __init__(self, groups: Groups, geometry: Geometry, ledger: Ledger) -> None:
        self._lanes: dict[int, Lane] = {}
        nesting, rank = geometry.nesting, groups.rank
        for level in (ISLAND, GROUP, DOMAIN, WORLD):
            members = nesting.part(level, rank)
            sides = len(members) if level == ISLAND else len(nesting.sides(level, rank))
            self._lanes[level] = Lane(
                groups.of(level), members, ledger, idle=sides == 1
            )

    def of(self, level: int) -> Lane:
        """Return the lane of a level."""
        return self._lanes[level]


class Reducer:
    """Sums gradients outwards; keeps them, and what quantising dropped, in between.

    Args:
        space: The model's.
        geometry: Its cuts.
        rank: Ours.
        lanes: To the others.
        wires: How elements travel.

    Attributes:
        gradients: This rank's part of a group's sum over micro-steps, packed by cut.
        totals: This rank's part of the sum over all ranks: complete once the flows of
            a step's last backward pass ended.
    """

    def __init__(
        self, space: Space, geometry: Geometry, rank: int, lanes: Lanes, wires: Wires
    ) -> None:
        self._lanes, self._wires = lanes, wires
        cuts = [geometry.cuts[level][rank] for level in range(4)]
        self._cuts = [[within(cut, unit) for unit in space.units] for cut in cuts]
        self._places = [packed(cut) for cut in cuts]
        self._moves = {
            level: [reduction(geometry, level, rank, unit) for unit in space.units]
            for level in (GROUP, DOMAIN, WORLD)
        }
        self._back = [
            gathering(geometry, GRADIENT_LEVELS, rank, unit) for unit in space.units
        ]
        self._domains = len(geometry.nesting.domains)
        self._residuals: dict[object, torch.Tensor] = {}
        self._spans = spans(cuts[GROUP], space.units)
        self.gradients = torch.zeros(geometry.held(GROUP, rank))
        shared = cuts[GROUP] == cuts[DOMAIN]
        self.totals = (
            self.gradients if shared else torch.zeros(geometry.held(DOMAIN, rank))
        )

    @property
    def residual_bytes(self) -> int:
        """What error feedback keeps at present."""
        return 4 * sum(kept.numel() for kept in self._residuals.values())

    def clear(self) -> None:
        """Forget the sums: the next step begins at zero."""
        self.gradients.zero_()

    def forget(self) -> None:
        """Forget also what quantising dropped: the gradients diverged."""
        self.clear()
        self._residuals.clear()

    def flow(
        self,
        unit: int,
        scattered: Callable[[], torch.Tensor],
        places: Places,
        *,
        last: bool,
    ) -> Stages:
        """Carry one unit's gradients outwards.

        Args:
            unit: Its number.
            scattered: Waits for the island's sum of our shard.
            places: Where the shard's pieces lie in it.
            last: Of the step's backward passes.
        """
        yield
        shard = scattered()
        yield from self._reduce(
            GROUP, unit, shard, places, self.gradients, accumulate=True
        )
        if not last:
            return
        yield from self._reduce(
            DOMAIN, unit, self.gradients, self._places[GROUP], self.totals
        )
        if self._domains == 1:
            return
        yield from self._reduce(
            WORLD, unit, self.totals, self._places[DOMAIN], self.totals
        )
        yield from self._bring_back(unit)

    def _reduce(
        self,
        level: int,
        unit: int,
        source: torch.Tensor,
        places: Places,
        target: torch.Tensor,
        *,
        accumulate: bool = False,
    ) -> Sums:
        moves = self._moves[level][unit]
        form = self._wires.reduce_g if level == GROUP else self._wires.reduce_o
        operation = {GROUP: "reduce_g", DOMAIN: "reduce_o", WORLD: "reduce_x"}[level]
        sends = {
            peer: self._encoded((level, unit, peer), take(source, places, cut), form)
            for peer, cut in moves.sends.items()
        }
        pending = self._lanes.of(level).swap(operation, sends, self._sizes(moves, form))
        yield
        into = self._places[min(level, DOMAIN)]
        kept = self._cuts[level][unit]
        if kept and source is not target:
            own = take(source, places, kept)
            (add if accumulate else put)(target, into, kept, own)
        for peer, data in pending.wait().items():
            cut = moves.receives[peer]
            values = decode(data, _numel(cut), form, self._wires.block)
            add(target, into, cut, values)

    def _bring_back(self, unit: int) -> Sums:
        plan, form = self._back[unit], self._wires.reduce_o
        places = self._places[DOMAIN]
        data = {
            n: self._encoded(
                ("back", unit, n), take(self.totals, places, plan.atoms[n].pieces), form
            )
            for n in plan.own
        }
        lanes = [self._lanes.of(WORLD)]
        yield from spread(plan, lanes, ["gather_x"], data, form, self._wires.block)
        for n, coded in data.items():
            atom = plan.atoms[n]
            values = decode(coded, atom.numel, form, self._wires.block)
            put(self.totals, places, atom.pieces, values)

    def _encoded(self, key: object, values: torch.Tensor, form: Form) -> torch.Tensor:
        feedback = self._wires.error_feedback and form in QUANTISED
        if feedback and key in self._residuals:
            values = values + self._residuals[key]
        data = encode(values, form, self._wires.block)
        if feedback:
            seen = decode(data, values.numel(), form, self._wires.block)
            self._residuals[key] = values - seen
        return data

    def _sizes(self, moves: Moves, form: Form) -> dict[int, int]:
        return {
            peer: encoded_bytes(_numel(cut), form, self._wires.block)
            for peer, cut in moves.receives.items()
        }


class Updater:
    """Brings updated weights from the optimizer's owners to every island.

    Quantised, a domain's islands hold the same weights, bit for bit, each within one
    quantised change of the master weights; other domains lose other bits.

    Args:
        space: The model's.
        geometry: Its cuts.
        rank: Ours.
        lanes: To the others.
        wires: How elements travel.
        shards: The weights of this rank by tensor, flat; written in place.
        own: The form that is the weights' own type.
    """

    def __init__(
        self,
        space: Space,
        geometry: Geometry,
        rank: int,
        lanes: Lanes,
        wires: Wires,
        shards: Mapping[int, torch.Tensor],
        own: Form,
    ) -> None:
        self._plans = [
            gathering(geometry, WEIGHT_LEVELS, rank, unit) for unit in space.units
        ]
        self._lanes = [lanes.of(DOMAIN), lanes.of(GROUP)]
        self._shards, self._own, self._block = shards, own, wires.block
        alone = geometry.nesting.part(ISLAND, rank) == geometry.nesting.part(
            DOMAIN, rank
        )
        # nothing travels in a domain of one island: then nothing need be lost
        self._form = own if alone else wires.update
        self._begins = {
            piece.tensor: piece.begin for piece in geometry.cuts[ISLAND][rank]
        }
        states = geometry.cuts[DOMAIN][rank]
        self._owned = [packed(within(states, unit)) for unit in space.units]

    def flow(self, unit: int, values: torch.Tensor, *, exact: bool = False) -> Stages:
        """Bring one unit's weights.

        Args:
            unit: Its number.
            values: (n,) fp32: the unit's part of this rank's states; not kept.
            exact: Whole values, whatever the wires say: what others hold is unknown.
        """
        plan = self._plans[unit]
        change = self._form in QUANTISED and not exact
        form: Form = self._form if change else self._own
        places = self._owned[unit]
        data = {}
        for n in plan.own:
            atom = plan.atoms[n]
            fresh = take(values, places, atom.pieces)
            if change:
                fresh -= self._held(atom.pieces)
            data[n] = encode(fresh, form, self._block)
        operations = ["gather_o", "gather_g"]
        yield from spread(plan, self._lanes, operations, data, form, self._block)
        for n, coded in data.items():
            atom = plan.atoms[n]
            fresh = decode(coded, atom.numel, form, self._block)
            at = 0
            for piece in atom.pieces:
                part = fresh[at : at + piece.numel]
                at += piece.numel
                held = self._view(piece)
                held.copy_(held.float() + part if change else part)

    def _held(self, cut: Cut) -> torch.Tensor:
        return torch.cat([self._view(piece).float() for piece in cut])

    def _view(self, piece: Piece) -> torch.Tensor:
        at = piece.begin - self._begins[piece.tensor]
        return self._shards[piece.tensor][at : at + piece.numel]


def spread(
    plan: Gathering,
    lanes: Sequence[Lane],
    operations: Sequence[str],
    data: dict[int, torch.Tensor],
    form: Form,
    block: int,
) -> Sums:
    """Carry atoms hop by hop; ``data`` grows from those we own to all we hold."""
    for hop, lane, operation in zip(plan.hops, lanes, operations, strict=True):
        sends = {
            peer: torch.cat([data[n] for n in numbers])
            for peer, numbers in hop.sends.items()
        }
        parts = {
            peer: [encoded_bytes(plan.atoms[n].numel, form, block) for n in numbers]
            for peer, numbers in hop.receives.items()
        }
        sizes = {peer: sum(found) for peer, found in parts.items()}
        pending = lane.swap(operation, sends, sizes)
        yield
        for peer, received in pending.wait().items():
            found = received.split(parts[peer])
            data.update(zip(hop.receives[peer], found, strict=True))


def _numel(cut: Cut) -> int:
    return sum(piece.numel for piece in cut)
