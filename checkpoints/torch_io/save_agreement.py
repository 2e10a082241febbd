"""How ranks agree on a save: who writes what, and that the step may be begun.

The plans of all ranks are gathered and merged once per layout. After that a save costs
one exchange of 32 bytes a rank: the digest of its names, types, shapes and boxes. If
any of them changes on any rank, the digests are new to all, and plans are made again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from checkpoints.save_plan import (
    LOCAL_PLAN_CODEC,
    RANK_PLAN_CODEC,
    HeldTensor,
    RankPlan,
    merge_plans,
)
from checkpoints.torch_io.exchange import Exchange, bodies, done, failed
from checkpoints.torch_io.pieces import Held, Value, survey
from checkpoints.writer import CheckpointWriter
from fabric.core.digest import digest
from fabric.core.errors import FabricError

CACHED_PLANS = 4
"""Layouts that a program saves in turn (say, with and without the optimizer)."""


class Planned(NamedTuple):
    """What this rank writes. Known on rank 0 only, and to be recorded by the commit:

    Attributes:
        mine: The boxes.
        key: The digests of all ranks' plans: equal keys, equal plans.
        empty: Tensors without elements.
        aliases: Name -> name of the tensor it is tied to.
    """

    mine: RankPlan
    key: bytes
    empty: dict[str, HeldTensor]
    aliases: dict[str, str]


class Agreement:
    """Plans of the ranks of ``exchange``, kept for the next save.

    Attributes:
        gathered: How often plans were gathered and merged.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._known: OrderedDict[bytes, Planned] = OrderedDict()
        self.gathered = 0

    def begin(
        self, writer: CheckpointWriter, tensors: Mapping[str, Value]
    ) -> tuple[Planned, dict[str, Held]]:
        """Return what this rank writes and holds; rank 0 has entered ``writer`` then.

        Raises:
            FabricError: a rank cannot; on every rank, and nothing is begun.
        """
        held: dict[str, Held] = {}
        encoded = b""
        begun = False
        try:
            try:
                plan, held = survey(tensors)
                encoded = LOCAL_PLAN_CODEC.encode(plan)
                outcome = done(digest(encoded))
                if self._exchange.rank == 0:
                    writer.__enter__()
                    begun = True
            except FabricError as exc:
                outcome = failed(exc)
            key = b"".join(bodies(self._exchange.all_gather(outcome)))
            return self._plan(key, encoded), held
        except BaseException:
            if begun:
                writer.__exit__(None, None, None)
            raise

    def _plan(self, key: bytes, encoded: bytes) -> Planned:
        """Return the merged plan; all ranks have it kept, or none has."""
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        self.gathered += 1
        local = self._exchange.gather(encoded)
        replies: list[bytes] = []
        empty: dict[str, HeldTensor] = {}
        aliases: dict[str, str] = {}
        if self._exchange.rank == 0:
            try:
                merged = merge_plans(
                    [LOCAL_PLAN_CODEC.decode_untrusted(each) for each in local]
                )
                replies = [done(RANK_PLAN_CODEC.encode(each)) for each in merged.ranks]
                empty, aliases = merged.empty, merged.aliases
            except FabricError as exc:
                replies = [failed(exc)] * self._exchange.world
        (body,) = bodies([self._exchange.scatter(replies)])
        mine = RANK_PLAN_CODEC.decode_untrusted(body)
        planned = self._known[key] = Planned(mine, key, empty, aliases)
        if len(self._known) > CACHED_PLANS:
            self._known.popitem(last=False)
        return planned
