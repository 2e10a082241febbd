"""What the daemon and its training worker say to each other, and workers to workers.

    Configure ->                    once; a job certificate's statement comes with it
            <- WorkerReady          the worker's throw-away public key (first of all)
    Certify ->                      a statement renewed before the old one expires
            <- Certified            the certificate to show in offers
    ApplyGeneration -> Connect ->   one Connect per socket, each with one descriptor
    Decide -> SaveCheckpoint -> WriteHot -> LoadHot -> Stop ->
            <- RoundReported, Held, Numbers, LinkMoved, Saved, HotWritten, Broken,
               Finished, Failed

Between workers, on one-way connections, each frame's meta is one of ExchangeMeta.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.digest import BLOCK_BYTES
from fabric.jobs.messages import (
    Count,
    Generation,
    Hex,
    Job,
    Peer,
    Reason,
    RoundDecision,
    RoundReport,
    StateHeld,
)
from fabric.jobs.spec import JobSpec

FactValue = Annotated[str, msgspec.Meta(max_length=1000)] | int | float | bool
FactsMap = Annotated[dict[str, FactValue], msgspec.Meta(max_length=64)]
FilePath = Annotated[str, msgspec.Meta(max_length=4096)]
Der = Annotated[bytes, msgspec.Meta(max_length=4096)]

MAX_STATE_BLOCKS = 1 << 20
"""1 TiB of state."""


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """Build the model, read the text, and the checkpoint in ``resume`` if not empty."""

    job: Job
    peer: Peer
    spec: JobSpec
    resume: FilePath = ""


class Certify(msgspec.Struct, frozen=True, tag="certify"):
    """Make a job certificate around a statement the daemon signed."""

    statement: Der


class ApplyGeneration(msgspec.Struct, frozen=True, tag="apply_generation"):
    """Take part in a generation; a later one replaces an earlier one."""

    generation: Generation


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """A connected socket, in the frame's one file descriptor.

    Attributes:
        peer: The daemon at the other end.
        outgoing: Whether we send on it; the one who dialled does.
        certificate: The one to trust in the handshake; empty for no TLS.
        own_certificate: Ours that the offer showed: it may be one renewal old.
        path: "local", "direct", "punched" or "relay".
    """

    peer: Peer
    outgoing: bool
    certificate: Der
    own_certificate: Der
    path: Annotated[str, msgspec.Meta(max_length=32)]


class Decide(msgspec.Struct, frozen=True, tag="decide"):
    """The coordinator's choice of a round's contributors."""

    decision: RoundDecision


class SaveCheckpoint(msgspec.Struct, frozen=True, tag="save_checkpoint"):
    """Write the start state of ``round`` to a directory inside the scratch."""

    directory: FilePath
    round: Count


class WriteHot(msgspec.Struct, frozen=True, tag="write_hot"):
    """Write the kept state called ``digest`` into the frame's one file descriptor."""

    digest: Hex


class LoadHot(msgspec.Struct, frozen=True, tag="load_hot"):
    """Keep the state in the frame's one file descriptor: a generation may name it."""

    round: Count
    digest: Hex


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Close the connections and exit."""


Command = (
    Configure
    | Certify
    | ApplyGeneration
    | Connect
    | Decide
    | SaveCheckpoint
    | WriteHot
    | LoadHot
    | Stop
)


class WorkerReady(msgspec.Struct, frozen=True, tag="worker_ready"):
    """The process runs inside its walls.

    Attributes:
        public_key: DER SubjectPublicKeyInfo of the worker's throw-away key.
        enforced: Walls that stand.
        lacking: Walls that do not, with the reason.
    """

    public_key: Der
    enforced: Annotated[tuple[Reason, ...], msgspec.Meta(max_length=16)]
    lacking: Annotated[tuple[Reason, ...], msgspec.Meta(max_length=16)]


class Certified(msgspec.Struct, frozen=True, tag="certified"):
    """The certificate (DER) that proves the worker's key for this job."""

    certificate: Der


class RoundReported(msgspec.Struct, frozen=True, tag="round_reported"):
    """What this worker holds of the current round."""

    report: RoundReport


class Held(msgspec.Struct, frozen=True, tag="held"):
    """This worker holds a round's start state; comes again with a validation loss."""

    held: StateHeld


class Numbers(msgspec.Struct, frozen=True, tag="numbers"):
    """Numbers for people."""

    facts: FactsMap


class LinkMoved(msgspec.Struct, frozen=True, tag="link_moved"):
    """Bytes on all sockets with one peer so far, TLS records included."""

    peer: Peer
    path: Annotated[str, msgspec.Meta(max_length=32)]
    sent_bytes: Count
    received_bytes: Count


class Saved(msgspec.Struct, frozen=True, tag="saved"):
    """The checkpoint is complete on disk."""

    directory: FilePath
    root: Hex
    round: Count
    size_bytes: Count


class SaveFailed(msgspec.Struct, frozen=True, tag="save_failed"):
    """No checkpoint was written; training goes on."""

    directory: FilePath
    code: Annotated[str, msgspec.Meta(max_length=64)]
    reason: Reason


class HotWritten(msgspec.Struct, frozen=True, tag="hot_written"):
    """The state called ``digest`` is in the file that came with WriteHot."""

    digest: Hex


class HotFailed(msgspec.Struct, frozen=True, tag="hot_failed"):
    """The state called ``digest`` was not written, or is not what LoadHot said."""

    digest: Hex
    reason: Reason


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """A connection failed; ``outgoing`` ones are ours to re-open."""

    peer: Peer
    outgoing: bool
    code: Annotated[str, msgspec.Meta(max_length=64)]
    reason: Reason


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The last round is complete; the worker goes on serving its state until Stop."""

    facts: FactsMap


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker cannot go on and exits.

    Attributes:
        may_restart: Whether the same job could work in a new process.
    """

    code: Annotated[str, msgspec.Meta(max_length=64)]
    reason: Reason
    may_restart: bool


Event = (
    WorkerReady
    | Certified
    | RoundReported
    | Held
    | Numbers
    | LinkMoved
    | Saved
    | SaveFailed
    | HotWritten
    | HotFailed
    | Broken
    | Finished
    | Failed
)

COMMAND: Codec[Command] = Codec(Command, max_bytes=1 << 20)
EVENT: Codec[Event] = Codec(Event, max_bytes=1 << 20)


class Contribution(msgspec.Struct, frozen=True, tag="contribution"):
    """A whole pseudo-gradient; the sender is its author. Payload: its encoding.

    Attributes:
        counter: Epoch the author is in.
        round: Round it belongs to.
        tokens: Tokens the author trained on.
    """

    counter: Count
    round: Count
    tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]


class ContributionStands(msgspec.Struct, frozen=True, tag="contribution_stands"):
    """What the sender sent in an earlier epoch counts in this one too. No payload."""

    counter: Count
    round: Count
    name: Hex


class StateListRequest(msgspec.Struct, frozen=True, tag="state_list_request"):
    """Ask for the block digests of the state that ``digest`` names."""

    digest: Hex


class StateList(msgspec.Struct, frozen=True, tag="state_list"):
    """Payload: 32 bytes per block; empty when the sender does not hold the state."""

    digest: Hex


class StateBlockRequest(msgspec.Struct, frozen=True, tag="state_block_request"):
    """Ask for one 1 MiB block of a state."""

    digest: Hex
    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_STATE_BLOCKS)]


class StateBlock(msgspec.Struct, frozen=True, tag="state_block"):
    """Payload: the block; empty when the sender does not hold the state."""

    digest: Hex
    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_STATE_BLOCKS)]


ExchangeMeta = (
    Contribution
    | ContributionStands
    | StateListRequest
    | StateList
    | StateBlockRequest
    | StateBlock
)
EXCHANGE: Codec[ExchangeMeta] = Codec(ExchangeMeta, max_bytes=4096)

FRAME_KIND = 1
"""Kind of every frame of the training exchange, version 1; the meta says the rest."""


def max_exchange_payload(contribution_bytes: int, num_blocks: int) -> int:
    """Return the largest payload a worker accepts from another, in bytes."""
    return max(contribution_bytes, BLOCK_BYTES, 32 * num_blocks)
