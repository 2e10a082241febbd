"""Which copies this peer should make or drop. Pure: facts and ``now`` come in.

Rule 1: a peer holds a copy as long as it said so within ``lost_after`` seconds; so a
lost one is replaced after that time, and a short absence moves nothing.
Rule 2: before a copy is made, everybody who could hold one was asked once; what was
known when this peer started is given ``lost_after`` to show.
Rule 3: a spare copy is dropped only while those that stay were heard in this period.
Rule 4: a peer that is silent, has no room or failed to make a copy is no candidate; the
next one is.

Pieces of erasure-coded content are content too, held once each. One moves to a peer
that holds at least two fewer of them. Once the loss of any one peer leaves enough
pieces to restore the whole, one copy of the whole is enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from checkpoints.mesh.placement import (
    Domains,
    missing_copies,
    spare_copies,
    spread,
)
from fabric.core.ids import BlobId, PeerId

SPARE_ASKED = 3
"""Peers asked about a root beyond the number of its copies."""


@dataclass(frozen=True)
class Want:
    """Content of which the mesh should hold copies.

    Attributes:
        root: The content.
        run: For whom it is kept.
        step: Newer steps are copied first.
        size: Bytes.
        copies: Wanted.
        hints: Who is said to hold it: its writer, and whom the routing names.
        siblings: If it is a piece: all pieces of the same whole.
        pieces: If it is a whole: its pieces, in order.
        needed: As many of them restore it.
    """

    root: BlobId
    run: str
    step: int
    size: int
    copies: int
    hints: frozenset[PeerId] = frozenset()
    siblings: frozenset[BlobId] = frozenset()
    pieces: tuple[BlobId, ...] = ()
    needed: int = 0


@dataclass
class _Peer:
    room: int = 0
    tried: bool = False
    heard_at: float = float("-inf")
    holds: dict[BlobId, float] = field(default_factory=dict)
    """When it last said so."""
    refuses: frozenset[BlobId] = frozenset()


class ReplicaTable:
    """What is known of the copies of some content.

    Args:
        own: This peer.
        now: Monotonic seconds at the start.
        lost_after: Seconds after which a silent holder is replaced.
    """

    def __init__(self, own: PeerId, now: float, lost_after: float) -> None:
        self._own = own
        self._started, self._lost_after = now, lost_after
        self._domains: Domains = {}
        self._wants: dict[BlobId, Want] = {}
        self._known_since: dict[BlobId, float] = {}
        self._asked_about: dict[BlobId, set[PeerId]] = {}
        self._peers: dict[PeerId, _Peer] = {own: _Peer(tried=True)}

    # -- facts

    def set_wants(self, wants: Iterable[Want], now: float) -> None:
        """Say what the mesh should hold copies of."""
        self._wants = {want.root: want for want in wants}
        for root in self._wants:
            self._known_since.setdefault(root, now)
        for root in self._known_since.keys() - self._wants.keys():
            del self._known_since[root]
            self._asked_about.pop(root, None)

    def set_members(self, domains: Domains) -> None:
        """Say who is there, ourselves included, and where."""
        self._domains = domains

    def answered(
        self,
        peer: PeerId,
        about: Collection[BlobId],
        holds: Collection[BlobId],
        refuses: Collection[BlobId],
        room: int,
        now: float,
    ) -> None:
        """``peer``, perhaps ourselves, said which of ``about`` it holds."""
        known = self._peers.setdefault(peer, _Peer())
        known.tried, known.heard_at, known.room = True, now, room
        known.refuses = known.refuses - frozenset(about) | frozenset(refuses)
        for root in about:
            self._asked_about.setdefault(root, set()).add(peer)
            known.holds.pop(root, None)
        known.holds.update(dict.fromkeys(holds, now))

    def silent(self, peer: PeerId, about: Collection[BlobId]) -> None:
        """``peer`` did not answer."""
        self._peers.setdefault(peer, _Peer()).tried = True
        for root in about:
            self._asked_about.setdefault(root, set()).add(peer)

    # -- conclusions

    def wanted(self) -> tuple[BlobId, ...]:
        """Return everything of which there should be copies."""
        return tuple(self._wants)

    def run_of(self, root: BlobId) -> str:
        """Return for whom ``root``, which is wanted, is kept."""
        return self._wants[root].run

    def asks(self) -> dict[PeerId, tuple[BlobId, ...]]:
        """Return whom to ask about what.

        A root concerns those who hold it, or are said to, and the first few of its
        rendezvous order, so the cost does not grow with the mesh.
        """
        found: dict[PeerId, list[BlobId]] = {}
        for root in self._wants:
            concerned = self._concerned(root)
            if self._own in concerned:
                for peer in concerned - {self._own}:
                    found.setdefault(peer, []).append(root)
        return {peer: tuple(roots) for peer, roots in found.items()}

    def holders(self, root: BlobId, now: float) -> frozenset[PeerId]:
        """Return who holds ``root``."""
        return frozenset(
            peer
            for peer, known in self._peers.items()
            if now - known.holds.get(root, float("-inf")) < self._lost_after
        )

    def copies(self, now: float) -> Mapping[BlobId, tuple[int, int]]:
        """Return how many copies there are and should be, of what concerns us."""
        return {
            root: (len(self.holders(root, now)), self._copies(want, now))
            for root, want in self._wants.items()
            if self._own in self._concerned(root)
        }

    def to_copy(self, now: float) -> list[Want]:
        """Return what this peer should fetch now, the newest step first."""
        found = [want for want in self._wants.values() if self._should_copy(want, now)]
        return sorted(found, key=lambda want: (-want.step, want.root))

    def to_drop(self, now: float) -> list[Want]:
        """Return what this peer holds although others hold enough."""
        return [
            want
            for root, want in self._wants.items()
            if self._own in self.holders(root, now) and self._is_spare(want, now)
        ]

    def to_remake(self, now: float) -> list[Want]:
        """Return the wholes of which we should make lost pieces again.

        The first holder of the whole does, once a piece had no holder for long enough
        that all who could hold it were asked.
        """
        found = []
        for want in self._wants.values():
            holders = self.holders(want.root, now)
            first = spread(want.root, holders, self._domains, count=1)
            lost = [p for p in want.pieces if p in self._wants and self._lost(p, now)]
            if lost and first == [self._own] and self._waited(want.root, now):
                found.append(want)
        return found

    def to_restore(self, now: float) -> list[Want]:
        """Return the wholes that nobody holds and that we should restore."""
        found = []
        for want in self._wants.values():
            held = [p for p in want.pieces if self.holders(p, now)]
            enough = want.needed and len(held) >= want.needed
            if enough and self._lost(want.root, now) and self._waited(want.root, now):
                fit = [p for p in self._domains if self._fits(p, want, now)]
                if spread(want.root, fit, self._domains, count=1) == [self._own]:
                    found.append(want)
        return found

    def _lost(self, root: BlobId, now: float) -> bool:
        return not self.holders(root, now) and self._all_asked(root)

    def _waited(self, root: BlobId, now: float) -> bool:
        """Whether holders had time to show since we know of ``root``."""
        return now - self._known_since[root] >= self._lost_after

    def _copies(self, want: Want, now: float) -> int:
        """Return how many copies there should be now."""
        if not want.pieces or want.copies <= 1:
            return want.copies
        load = self._load(want.pieces, now)
        held = sum(bool(self.holders(piece, now)) for piece in want.pieces)
        left = held - max(load.values(), default=0)
        return 1 if left >= want.needed else want.copies

    def _load(self, pieces: Iterable[BlobId], now: float) -> Counter[PeerId]:
        """Return how many of ``pieces`` each peer holds."""
        return Counter(peer for root in pieces for peer in self.holders(root, now))

    def _all_asked(self, root: BlobId) -> bool:
        there = self._concerned(root) & self._domains.keys() - {self._own}
        return there <= self._asked_about.get(root, set())

    def _concerned(self, root: BlobId) -> set[PeerId]:
        want = self._wants[root]
        found = set(want.hints & self._domains.keys())
        # all pieces of a whole concern the same peers: they are dealt out among them
        key, count = min(want.siblings, default=root), want.copies
        count = max(count, len(want.siblings)) + SPARE_ASKED
        found |= set(spread(key, self._domains, self._domains, count=count))
        return found | {p for p, known in self._peers.items() if root in known.holds}

    def _should_copy(self, want: Want, now: float) -> bool:
        root = want.root
        holders = self.holders(root, now)
        since = self._known_since[root]
        early = since <= self._started and now - since < self._lost_after
        if self._own in holders or not holders or early:
            return False
        if not self._all_asked(root):
            return False
        fit = [p for p in self._domains if self._fits(p, want, now)]
        if want.siblings:
            return self._takes_piece(want, holders, fit, now)
        wanted = self._copies(want, now)
        return self._own in missing_copies(root, holders, fit, self._domains, wanted)

    def _takes_piece(
        self, want: Want, holders: Collection[PeerId], fit: list[PeerId], now: float
    ) -> bool:
        load = self._load(want.siblings, now)
        least = min((load[peer] for peer in fit if peer not in holders), default=0)
        light = [p for p in fit if p not in holders and load[p] == least]
        crowded = len(holders) == 1 and load[min(holders)] >= least + 2
        first = spread(want.root, light, self._domains, holders, count=1)
        return crowded and first == [self._own]

    def _fits(self, peer: PeerId, want: Want, now: float) -> bool:
        known = self._peers.get(peer)
        if known is None or now - known.heard_at >= self._lost_after:
            return False
        return want.root not in known.refuses and known.room >= want.size

    def _is_spare(self, want: Want, now: float) -> bool:
        holders = self.holders(want.root, now)
        if want.siblings:
            load = self._load(want.siblings, now)
            order = sorted(holders, key=lambda peer: (load[peer], peer))
            spare = order[want.copies :]
        else:
            wanted = self._copies(want, now)
            spare = spare_copies(want.root, holders, self._domains, wanted)
        if self._own not in spare:
            return False
        # Those that stay are heard now, not only within the bound of a loss.
        ages = [now - self._peers[p].holds[want.root] for p in holders - set(spare)]
        return all(age < self._lost_after / 2 for age in ages)
