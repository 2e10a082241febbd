"""The acceptor: what a peer has promised about a job, and what it may still promise.

Rules. (1) A peer acks each epoch counter at most once, and never one at or below the
highest it acked or saw committed. (2) What it promised is on disk, with a full sync,
before the ack leaves: every method that changes the promise returns the record to
persist. (3) An ack lists everything acked above the last commit, because any of it may
have been committed unseen (see ``quorum.py``). (4) A proposal built on an older commit
than ours is refused with ours. Change together with ``quorum.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from fabric.core.codec import Codec
from fabric.core.errors import IntegrityError
from fabric.core.ids import JobId, PeerId
from fabric.jobs.messages import (
    ACK_BODY,
    MAX_PENDING,
    AckBody,
    Commit,
    Generation,
    Nack,
    PendingGeneration,
    Proof,
    Propose,
    generation_hash,
)
from fabric.jobs.quorum import electors
from fabric.jobs.spec import JobSpec


def genesis_of(job: JobId, spec: JobSpec) -> Generation:
    """Return generation 0, implied by the spec: the submitter alone."""
    submitter = PeerId(spec.submitter)
    first = spec.resume_round
    return Generation(job, 0, submitter, (submitter,), first, "", (), "")


class Held(NamedTuple):
    """The newest state this peer holds; nothing but the initial one by default."""

    round: int = 0
    digest: str = ""
    has_state: bool = False


class PromiseRecord(msgspec.Struct, frozen=True):
    """What must survive a restart of the peer."""

    promised: int
    promised_hash: str
    accepted: Generation | None
    pending: tuple[PendingGeneration, ...]
    committed: Generation
    proof: Proof


RECORD: Codec[PromiseRecord] = Codec(PromiseRecord, max_bytes=4 << 20)


class Acceptor:
    """Promises of one peer about one job.

    Args:
        job: The job.
        genesis: Generation 0, which needs no acks.
        record: What was persisted last, or None on the first start.
    """

    def __init__(
        self, job: JobId, genesis: Generation, record: PromiseRecord | None = None
    ) -> None:
        self._job = job
        self._record = record or PromiseRecord(
            promised=0,
            promised_hash=generation_hash(genesis),
            accepted=None,
            pending=(),
            committed=genesis,
            proof=(),
        )

    @property
    def record(self) -> PromiseRecord:
        """The state as it must be on disk."""
        return self._record

    @property
    def committed(self) -> Generation:
        """Newest generation known to be committed."""
        return self._record.committed

    @property
    def promised(self) -> int:
        """Highest epoch counter acked or seen committed."""
        return self._record.promised

    @property
    def fenced(self) -> bool:
        """Whether a promise above the committed generation forbids acting in it."""
        return self.promised > self.committed.counter

    def commit(self) -> Commit:
        """Return the newest commit with its proof."""
        return Commit(self._record.committed, self._record.proof)

    def refuse(self, code: str, reason: str) -> Nack:
        """Return a refusal that carries the newest commit."""
        record = self._record
        return Nack(record.promised, record.committed, code, reason, record.proof)

    def on_propose(
        self, propose: Propose, held: Held
    ) -> tuple[AckBody | Nack, PromiseRecord | None]:
        """Promise or refuse; persist the record, if any, before answering."""
        record, generation = self._record, propose.generation
        if generation.counter <= record.promised:
            reason = f"epoch {generation.counter} <= promised {record.promised}"
            return self.refuse("E_PROMISED", reason), None
        if propose.base_counter < record.committed.counter:
            reason = f"built on epoch {propose.base_counter}, a later one stands"
            return self.refuse("E_BEHIND", reason), None
        body = AckBody(
            job=self._job,
            counter=generation.counter,
            generation=generation_hash(generation),
            held_round=held.round,
            held_digest=held.digest,
            has_state=held.has_state,
            accepted=record.accepted,
            committed=record.committed.counter,
            pending=record.pending,
        )
        pending = _with(record.pending, generation)
        if len(pending) > MAX_PENDING or len(ACK_BODY.encode(body)) > 60_000:
            return self.refuse("E_PENDING", "too many open proposals"), None
        self._record = msgspec.structs.replace(
            record,
            promised=generation.counter,
            promised_hash=body.generation,
            accepted=generation,
            pending=pending,
        )
        return body, self._record

    def on_commit(self, commit: Commit) -> PromiseRecord | None:
        """Learn that a generation stands; None when that is no news.

        Raises:
            IntegrityError: another generation stands under the same counter.
        """
        record, generation = self._record, commit.generation
        if generation.counter < record.committed.counter:
            return None
        if generation.counter == record.committed.counter:
            if generation != record.committed:
                raise IntegrityError(f"two generations with epoch {generation.counter}")
            return None
        promised, promised_hash = record.promised, record.promised_hash
        if generation.counter >= promised:
            promised = generation.counter
            promised_hash = generation_hash(generation)
        accepted = record.accepted
        if accepted is not None and accepted.counter <= generation.counter:
            accepted = None
        self._record = PromiseRecord(
            promised=promised,
            promised_hash=promised_hash,
            accepted=accepted,
            pending=tuple(p for p in record.pending if p.counter > generation.counter),
            committed=generation,
            proof=commit.acks,
        )
        return self._record


def _with(
    pending: tuple[PendingGeneration, ...], generation: Generation
) -> tuple[PendingGeneration, ...]:
    names = tuple(sorted(electors(generation)))
    kept = tuple(p for p in pending if p.electors != names)
    return (*kept, PendingGeneration(generation.counter, generation.previous, names))
