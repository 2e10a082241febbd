"""Generations, acks, reports and decisions: the messages of a running job.

    Inquire ->                        a candidate asks who is there, and what they hold
            <- Standing
    Propose ->                        a candidate asks every participant it lists
            <- Ack | Nack             and every one of the previous generation
    Commit  ->                        with acks of a majority of the previous one
    Beat    ->                        coordinator to participants: is anybody silent?
            <- Standing
    RoundReport ->                    worker's facts, to the generation's coordinator
    RoundDecision ->                  coordinator's choice, to every participant
    Save    ->                        coordinator to one holder of the last state
    Saved   ->                        that holder's checkpoint root
    Finished ->                       the job ended; every runner may go

The fencing epoch of a generation is (counter, hash); whoever acts checks it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fabric.core.codec import Codec
from fabric.core.digest import hex_digest
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import JobId, PeerId
from fabric.core.signing import Signed

MAX_PARTICIPANTS = 256
"""Participants of one generation; larger runs need a hierarchy of coordinators."""

MAX_PENDING = 64
"""Distinct uncommitted electorates one peer remembers; then it acks known ones only."""

MAX_FACTS = 512
"""Facts of one peer about one job: a few numbers, and one per link."""

MAX_SETTINGS = 16
"""Settings in force that a decision carries."""

Peer = Annotated[PeerId, msgspec.Meta(max_length=64)]
Job = Annotated[JobId, msgspec.Meta(max_length=64)]
Hex = Annotated[str, msgspec.Meta(max_length=64)]
Peers = Annotated[tuple[Peer, ...], msgspec.Meta(max_length=MAX_PARTICIPANTS)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Reason = Annotated[str, msgspec.Meta(max_length=500)]
FactKey = Annotated[str, msgspec.Meta(max_length=160)]
FactDict = Annotated[
    dict[FactKey, Reason | int | float | bool], msgspec.Meta(max_length=MAX_FACTS)
]
Proof = Annotated[tuple[Signed, ...], msgspec.Meta(max_length=2 * MAX_PARTICIPANTS)]


class Setting(msgspec.Struct, frozen=True, array_like=True):
    """A number of the spec that ``author`` changed while the job runs."""

    path: Annotated[str, msgspec.Meta(max_length=100)]
    value: float
    author: Peer


Settings = Annotated[tuple[Setting, ...], msgspec.Meta(max_length=MAX_SETTINGS)]


class Generation(msgspec.Struct, frozen=True, tag="generation"):
    """Who takes part from ``base_round`` on, under one fencing epoch.

    Attributes:
        job: The job.
        counter: Fencing epoch: strictly increasing on the main branch. Generation 0 is
            implied by the spec: its only participant is the submitter.
        coordinator: Decides rounds while this generation lasts.
        participants: Sorted.
        base_round: Every participant starts at this round's state.
        state_digest: Hex digest of that state; empty for the initial state, which
            everyone derives from the spec's seed.
        sources: Participants that hold that state.
        previous: Hash of the generation whose majority acked this one.
        witness: A trusted member that acks in place of a lost one of two, or empty.
        branch: "main", or the id of a fork.
        settings: In force at ``base_round``, for those who were not there before.
    """

    job: Job
    counter: Count
    coordinator: Peer
    participants: Peers
    base_round: Count
    state_digest: Hex
    sources: Peers
    previous: Hex
    witness: Annotated[str, msgspec.Meta(max_length=64)] = ""
    branch: Annotated[str, msgspec.Meta(max_length=64)] = "main"
    settings: Settings = ()


class PendingGeneration(msgspec.Struct, frozen=True, array_like=True):
    """A generation that was acked and may have been committed unseen.

    Attributes:
        counter: The newest epoch acked with these electors.
        previous: Hash of the generation it follows.
        electors: Its participants and its witness, sorted.
    """

    counter: Count
    previous: Hex
    electors: Peers


class Propose(msgspec.Struct, frozen=True, tag="propose"):
    """Ask for a promise never to ack a lower or equal epoch of this job.

    Attributes:
        generation: The generation to promise.
        base_counter: Counter of the committed generation it follows.
    """

    generation: Generation
    base_counter: Count = 0


class AckBody(msgspec.Struct, frozen=True):
    """What an ack signs: the promise, and what the acker holds.

    Attributes:
        held_round: Newest round whose start state this peer holds.
        held_digest: Hex digest of that state; empty for the initial state or none.
        has_state: Whether it holds any state (a newcomer does not).
        accepted: Newest generation this peer ever acked before, or None.
        committed: Counter of the newest generation it knows to be committed.
        pending: Everything it acked above ``committed``, equal electors merged.
    """

    job: Job
    counter: Count
    generation: Hex
    held_round: Count = 0
    held_digest: Hex = ""
    has_state: bool = False
    accepted: Generation | None = None
    committed: Count = 0
    pending: Annotated[
        tuple[PendingGeneration, ...], msgspec.Meta(max_length=MAX_PENDING)
    ] = ()


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """A promise; the envelope's payload is an encoded :class:`AckBody`."""

    envelope: Signed


class Nack(msgspec.Struct, frozen=True, tag="nack"):
    """No: a higher or equal promise was given, or the sender acts on an old epoch.

    ``committed`` with its ``proof`` lets a sender that is behind catch up.
    """

    promised: Count
    committed: Generation | None
    code: Annotated[str, msgspec.Meta(max_length=64)]
    reason: Reason
    proof: Proof = ()


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """The generation stands; ``acks`` prove it to whoever checks."""

    generation: Generation
    acks: Proof


class RoundReport(msgspec.Struct, frozen=True, tag="round_report"):
    """One participant finished its inner steps or received another contribution.

    Attributes:
        holds: Contributors whose whole pseudo-gradient this peer has, itself included
            once its inner steps are done.
        tokens: Tokens it trained on in this round (0 until done).
        loss: Mean training loss of the round's inner steps, nats per token.
        broken: Participants whose connection to this peer's worker failed.
    """

    job: Job
    counter: Count
    round: Count
    holds: Peers
    tokens: Count = 0
    loss: float = 0.0
    broken: Peers = ()


class RoundDecision(msgspec.Struct, frozen=True, tag="round_decision"):
    """The contributors of a round, chosen once; every participant averages just these.

    ``last`` ends the run after this round; ``tokens_before`` counts the rounds before.
    ``settings`` hold for this round's outer step and for the rounds after it.
    """

    job: Job
    counter: Count
    round: Count
    contributors: Peers
    tokens: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_PARTICIPANTS)]
    last: bool = False
    tokens_before: Count = 0
    settings: Settings = ()


class StateHeld(msgspec.Struct, frozen=True, tag="state_held"):
    """A participant now holds the start state of ``round``."""

    job: Job
    counter: Count
    round: Count
    state_digest: Hex
    validation_loss: float | None = None


class Join(msgspec.Struct, frozen=True, tag="join"):
    """A member asks the coordinator to be a participant from the next round on.

    From a current participant: it restarted, and holds nothing any more.
    """

    job: Job


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """A participant asks to be left out; at once when its worker ``failed``."""

    job: Job
    failed: bool = False
    reason: Reason = ""


class Inquire(msgspec.Struct, frozen=True, tag="inquire"):
    """Ask for a peer's :class:`Standing`; binds nobody to anything.

    Attributes:
        counter: Newest committed generation the asker knows.
    """

    job: Job
    counter: Count


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The coordinator lives, and the generation's current round is ``round``.

    ``missing`` names lost electors while it has no majority, and must pause. ``facts``
    are the job's totals, so that a successor goes on counting.
    """

    job: Job
    counter: Count
    round: Count
    missing: Peers = ()
    facts: FactDict = {}


class Standing(msgspec.Struct, frozen=True, tag="standing"):
    """Where a peer stands; the fields of :class:`AckBody` without the promise.

    Attributes:
        committed: Newest committed generation, when newer than the asker's.
        follows: Whether it heard the coordinator of its generation lately.
        busy: It applies a decision now, so what it holds is about to change.
    """

    job: Job
    promised: Count
    held_round: Count = 0
    held_digest: Hex = ""
    has_state: bool = False
    follows: bool = False
    busy: bool = False
    committed: Generation | None = None
    proof: Proof = ()


class PeerFacts(msgspec.Struct, frozen=True, tag="peer_facts"):
    """A participant's numbers for people. Never decides anything."""

    job: Job
    counter: Count
    facts: FactDict


class Save(msgspec.Struct, frozen=True, tag="save"):
    """The receiver writes the state of ``round`` as a checkpoint."""

    job: Job
    counter: Count
    round: Count


class Saved(msgspec.Struct, frozen=True, tag="saved"):
    """The checkpoint is written and announced; an empty root says it failed."""

    job: Job
    counter: Count
    round: Count
    root: Hex
    reason: Reason = ""


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The job ended in ``state`` (done, failed or cancelled), with its final facts."""

    job: Job
    counter: Count
    state: Literal["done", "failed", "cancelled"]
    reason: Reason = ""
    facts: FactDict = {}


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The request was taken; nothing to add."""


JobMessage = (
    Propose
    | Ack
    | Nack
    | Commit
    | RoundReport
    | RoundDecision
    | StateHeld
    | Join
    | Leave
    | Inquire
    | Beat
    | Standing
    | PeerFacts
    | Save
    | Saved
    | Finished
    | Done
)

CODEC: Codec[JobMessage] = Codec(JobMessage, max_bytes=4 << 20)
ACK_BODY: Codec[AckBody] = Codec(AckBody, max_bytes=1 << 16)
GENERATION: Codec[Generation] = Codec(Generation, max_bytes=1 << 16)

KIND_ACK = "jobs.ack"
"""Envelope kind of a signed :class:`AckBody`."""


def generation_hash(generation: Generation) -> str:
    """Return the hex digest that names ``generation``."""
    return hex_digest(GENERATION.encode(generation))


def job_of(message: JobMessage) -> JobId:
    """Return the job that ``message`` is about.

    Raises:
        RemoteProtocolError: it is an answer, which names none.
    """
    if isinstance(message, Propose | Commit):
        return message.generation.job
    found = getattr(message, "job", None)
    if found is None or isinstance(message, Standing):
        raise RemoteProtocolError(f"{type(message).__name__} names no job")
    return JobId(found)
