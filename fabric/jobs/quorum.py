"""When may a proposed generation be committed? Majorities over a moving electorate.

Generations form a chain: each is committed with acks of a majority of the electors of
the one before. A proposer knows some committed generation, its *base*, but later ones
may have been committed unseen. Every ack therefore lists what the acker acked above its
own last commit (*pending*), and the proposer needs

    a majority of the base, and a majority of every pending electorate
    that has not been shown to be dead.

A pending electorate X is dead when it cannot have reached a majority of any electorate
it could have followed: for the base and for each other living electorate Y, so many
members of Y acked *us without listing X* that the rest of Y is no majority.

Why two generations never share one epoch. Let C0, C1, ... Ck be those committed below
counter c. The proposer's base is some Ci. C(i+1) was acked by a majority of Ci, which
meets ours in a peer that lists it, and it is never shown dead, because a majority of Ci
lists it. So we need a majority of C(i+1) too, and so on up to Ck. Two proposals of one
counter both need a majority of Ck, and a peer acks a counter once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fabric.core.ids import PeerId
from fabric.jobs.messages import AckBody, Generation

Electorate = frozenset[PeerId]


def electors(generation: Generation) -> Electorate:
    """Return who votes on the successor: the participants, and the witness if any."""
    names = frozenset(generation.participants)
    return names | {PeerId(generation.witness)} if generation.witness else names


def majority(electorate: Electorate) -> int:
    """Return the smallest number of votes that two disjoint groups cannot both have."""
    return len(electorate) // 2 + 1


def has_majority(electorate: Electorate, voters: Iterable[PeerId]) -> bool:
    """Return whether ``voters`` hold a majority of ``electorate``."""
    return len(electorate.intersection(voters)) >= majority(electorate)


class Tally:
    """The acks of one proposal.

    Args:
        base: Electors of the newest committed generation the proposer knows.
        base_counter: Its counter.
    """

    def __init__(self, base: Electorate, base_counter: int) -> None:
        self._base = base
        self._base_counter = base_counter
        self._acks: dict[PeerId, AckBody] = {}

    @property
    def acks(self) -> Mapping[PeerId, AckBody]:
        """The acks so far, by signer."""
        return self._acks

    def add(self, peer: PeerId, body: AckBody) -> None:
        """Count ``peer``'s ack."""
        self._acks[peer] = body

    def _listed(self, body: AckBody) -> set[Electorate]:
        return {
            frozenset(pending.electors)
            for pending in body.pending
            if pending.counter > self._base_counter
        }

    def _is_dead(self, electorate: Electorate, living: set[Electorate]) -> bool:
        deniers = {
            peer
            for peer, body in self._acks.items()
            if electorate not in self._listed(body)
        }
        return all(
            len(other & deniers) > len(other) - majority(other)
            for other in living
            if other != electorate
        )

    def required(self) -> set[Electorate]:
        """Return the electorates of which a majority must ack, base included."""
        living = {self._base}
        for body in self._acks.values():
            living |= self._listed(body)
        while True:
            dead = next(
                (
                    electorate
                    for electorate in sorted(living, key=sorted)
                    if electorate != self._base and self._is_dead(electorate, living)
                ),
                None,
            )
            if dead is None:
                return living
            living.discard(dead)

    @property
    def won(self) -> bool:
        """Whether the proposal may be committed."""
        return all(has_majority(group, self._acks) for group in self.required())

    def missing(self) -> tuple[PeerId, ...]:
        """Return, sorted, the electors whose ack is still worth having."""
        short: set[PeerId] = set()
        for group in self.required():
            if not has_majority(group, self._acks):
                short |= group - self._acks.keys()
        return tuple(sorted(short))
