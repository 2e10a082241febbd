"""Typed tables of jobs and their assignments. Specs and generations are opaque here.

j/<id>/spec     bytes whose BLAKE3 is the id; immutable
j/<id>/st       JobStatus: greatest by (state, counter, clock) over all authors
a/<id>/main     Assignment: greatest counter over all authors
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from crdt_store.entry import MAX_VALUE_BYTES, Entry
from crdt_store.views import DAY_SECONDS, Count, Values, View, segment
from fabric.core.digest import hex_digest
from fabric.core.ids import JobId, PeerId, public_key_of

JOB_TTL_SECONDS = 7 * DAY_SECONDS
OVER_TTL_SECONDS = 30 * DAY_SECONDS
"""That a job is over outlives its spec by weeks: a peer that was away must not bring
the job back to life."""

State = Literal["queued", "running", "done", "failed", "cancelled"]
_RANK: dict[State, int] = {
    "queued": 0,
    "running": 1,
    "done": 2,
    "failed": 2,
    "cancelled": 2,
}


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a job stands, as its coordinator says.

    Attributes:
        state: queued < running < done, failed, cancelled.
        counter: Generation counter of whoever says so.
        coordinator: PeerId, or empty.
        detail: What only the jobs service reads; opaque here.
    """

    state: State
    counter: Count = 0
    coordinator: Annotated[str, msgspec.Meta(max_length=64)] = ""
    detail: Annotated[bytes, msgspec.Meta(max_length=3900)] = b""

    @property
    def final(self) -> bool:
        """Whether nothing can follow."""
        return _RANK[self.state] == 2

    @property
    def _order(self) -> tuple[int, int]:
        return _RANK[self.state], self.counter


class Assignment(msgspec.Struct, frozen=True):
    """A generation as published by one author: a hint until its acks are checked."""

    counter: Count
    generation: Annotated[bytes, msgspec.Meta(max_length=MAX_VALUE_BYTES)]


@dataclass(frozen=True, slots=True)
class JobRow:
    """What the mesh knows of one job.

    Attributes:
        spec: Encoded spec; None while it has not arrived.
        author: Who published the spec first.
        status: None while nobody said anything.
    """

    spec: bytes | None
    author: PeerId | None
    status: JobStatus | None


_STATUS: Values[JobStatus] = Values(JobStatus)
_ASSIGNMENT: Values[Assignment] = Values(Assignment)


class Jobs(View):
    """Specs and statuses."""

    table = "j"

    async def put_spec(self, job: JobId, spec: bytes) -> None:
        """Publish an encoded spec.

        Raises:
            ValueError: ``job`` is not its hash.
        """
        if hex_digest(spec) != job:
            raise ValueError("a job's id is the BLAKE3 of its encoded spec")
        await self._put(f"j/{job}/spec", spec, JOB_TTL_SECONDS)

    def _specs(self, job: str) -> list[Entry]:
        found = self._slots.at(f"j/{job}/spec")
        genuine = [entry for entry in found if hex_digest(entry.value) == job]
        return sorted(genuine, key=lambda entry: entry.order)

    def spec(self, job: JobId) -> bytes | None:
        """Return the encoded spec."""
        specs = self._specs(job)
        return specs[0].value if specs else None

    def author(self, job: JobId) -> PeerId | None:
        """Return who published the spec first.

        A member can publish it again with an earlier clock, so compare with the
        submitter the spec names (see :meth:`authors`).
        """
        specs = self._specs(job)
        return specs[0].peer if specs else None

    def authors(self, job: JobId) -> frozenset[PeerId]:
        """Return everyone who published the spec."""
        return frozenset(entry.peer for entry in self._specs(job))

    def spec_until(self, job: JobId) -> float:
        """Return the wall seconds until which somebody's spec stands; 0: none does."""
        return max((entry.expires_at for entry in self._specs(job)), default=0.0)

    async def put_status(
        self, job: JobId, status: JobStatus, *, again: bool = False
    ) -> None:
        """Publish how ``job`` stands; does nothing if we said something greater.

        Nor if we said the same, unless it is to stand longer and so said ``again``.
        """
        key = f"j/{segment(job)}/st"
        held = _STATUS.read(self._slots.get((key, public_key_of(self._me))))
        same = status == held and not again
        if held is not None and (same or held._order > status._order):
            return
        ttl = OVER_TTL_SECONDS if status.final else JOB_TTL_SECONDS
        await self._put(key, _STATUS.encode(status), ttl)

    def status(self, job: JobId) -> JobStatus | None:
        """Return the greatest status anybody authorised published."""
        found = self._greatest(job)
        return None if found is None else found[1]

    def status_until(self, job: JobId) -> float:
        """Return the wall seconds until which :meth:`status` stands; 0: none."""
        found = self._greatest(job)
        return 0.0 if found is None else found[0].expires_at

    def _greatest(self, job: JobId) -> tuple[Entry, JobStatus] | None:
        read = ((e, _STATUS.read(e)) for e in self._slots.at(f"j/{job}/st"))
        found = [(e, s) for e, s in read if s is not None]
        return max(
            found, key=lambda pair: (pair[1]._order, pair[0].order), default=None
        )

    def all(self) -> dict[JobId, JobRow]:
        """Return every job known."""
        ids = {JobId(entry.key.split("/")[1]) for entry in self._slots.under("j/")}
        return {
            job: JobRow(self.spec(job), self.author(job), self.status(job))
            for job in sorted(ids)
        }


class Assignments(View):
    """Published generations: who takes part in which job."""

    table = "a"

    async def put(self, job: JobId, counter: int, generation: bytes) -> None:
        """Publish an encoded generation.

        Raises:
            ValueError: too large for a slot.
        """
        value = _ASSIGNMENT.encode(Assignment(counter, generation))
        await self._put(f"a/{segment(job)}/main", value, JOB_TTL_SECONDS)

    def held_until(self, job: JobId) -> float:
        """Return the wall seconds until which our own stands; 0: there is none."""
        held = self._slots.get((f"a/{job}/main", public_key_of(self._me)))
        return 0.0 if held is None else held.expires_at

    def get(self, job: JobId) -> Assignment | None:
        """Return the one with the greatest counter, then the latest."""
        found = self.candidates(job)
        return found[0][1] if found else None

    def candidates(self, job: JobId) -> list[tuple[PeerId, Assignment]]:
        """Return (author, assignment), greatest counter first.

        Any worker can publish any counter: take the first whose acks prove it. Who is
        dead may come back; the word of who left or was revoked does not count.
        """
        read = (
            (entry, _ASSIGNMENT.read(entry))
            for entry in self._slots.at(f"a/{job}/main")
            if self.absence(entry.peer) in ("", "dead")
        )
        found = [(a.counter, e.order, e.peer, a) for e, a in read if a is not None]
        found.sort(key=lambda item: item[:2], reverse=True)
        return [(peer, assignment) for _, _, peer, assignment in found]
