"""What a stage worker hears and says: to its daemon, and to its neighbours.

Daemon -> worker: Certify, Assign, Attach (with a socket), Start, Stop.
Worker -> daemon: WorkerKey, Certified, Loaded, Attached, Sampled, Ended, ChannelLost.
Stage -> next stage: one frame a step, ``Activations`` in the meta and fp32 rows in the
payload. Last stage -> first: ``Feedback`` in the meta. Both carry the epoch of the
generation; frames of another epoch are dropped.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fabric.core.codec import Codec
from inference.messages import (
    Finish,
    Index,
    Peer,
    Sampling,
    Session,
    SessionToken,
    Tokens,
)

MAX_ROWS = 512
"""Sequences in one frame; above InferenceConfig.max_sequences."""
KIND_ACTIVATIONS, KIND_FEEDBACK = 1, 2

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Der = Annotated[bytes, msgspec.Meta(max_length=4096)]
ChannelName = Literal["activations", "tokens"]
KIND_CHANNELS: dict[int, ChannelName] = {
    KIND_ACTIVATIONS: "activations",
    KIND_FEEDBACK: "tokens",
}


class Certify(msgspec.Struct, frozen=True, tag="certify"):
    """The identity's statement about the worker's key."""

    statement: Der


class Assign(msgspec.Struct, frozen=True, tag="assign"):
    """Be ``stage`` of ``stages`` under ``epoch``, with the model in ``directory``."""

    epoch: Count
    stage: Index
    stages: Index
    directory: Annotated[str, msgspec.Meta(max_length=4096)]
    max_sequences: Index
    max_waiting: Index
    prefill_tokens: Index


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """Use the socket that comes with this frame.

    Attributes:
        epoch: Generation it belongs to.
        channel: What it carries.
        outgoing: Whether this worker sends on it, or receives.
        server: Side of the TLS handshake; with punched sockets either end may be it.
        peer_certificate: The one to trust; empty: same daemon, no TLS.
    """

    epoch: Count
    channel: ChannelName
    outgoing: bool
    server: bool
    peer_certificate: Der


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Begin a session, at the first stage."""

    session: Session
    reply_to: Peer
    prompt: Tokens
    sampling: Sampling


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Forget a session of ``reply_to``."""

    session: Session
    reply_to: Peer


class WorkerKey(msgspec.Struct, frozen=True, tag="worker_key"):
    """The worker's public key; the private one stays where it was made."""

    spki: Annotated[bytes, msgspec.Meta(max_length=256)]


class Certified(msgspec.Struct, frozen=True, tag="certified"):
    """The worker's job certificate."""

    der: Der


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The stage's layers are in memory."""

    epoch: Count
    layers: tuple[Index, Index]
    context_tokens: Index
    vocab_size: Index
    parameters: Count


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """A channel passed its handshake and is in use."""

    epoch: Count
    channel: ChannelName
    outgoing: bool


class Sampled(msgspec.Struct, frozen=True, tag="sampled"):
    """Tokens that the last stage picked, each with the gateway it goes to."""

    tokens: Annotated[
        tuple[tuple[Peer, SessionToken], ...], msgspec.Meta(max_length=MAX_ROWS)
    ]


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """A session left the first stage."""

    session: Session
    reply_to: Peer


class ChannelLost(msgspec.Struct, frozen=True, tag="channel_lost"):
    """A neighbour is gone, or failed its handshake."""

    epoch: Count
    channel: ChannelName
    outgoing: bool
    reason: Annotated[str, msgspec.Meta(max_length=2000)]


Command = Certify | Assign | Attach | Start | Stop
Event = WorkerKey | Certified | Loaded | Attached | Sampled | Ended | ChannelLost

COMMANDS: Codec[Command] = Codec(Command, max_bytes=2 << 20)
EVENTS: Codec[Event] = Codec(Event, max_bytes=1 << 20)


class Opening(msgspec.Struct, frozen=True, array_like=True):
    """What the last stage must know about a sequence; rides its first row."""

    session: Session
    reply_to: Peer
    prompt_tokens: Index
    sampling: Sampling


class Row(msgspec.Struct, frozen=True, array_like=True):
    """``length`` consecutive tokens of one sequence, in one step.

    Attributes:
        sequence: Unique under the first stage's worker.
        slot: Place in every stage's KV memory.
        position: Of the first of the tokens.
        length: How many.
        sample: Whether a token is to be picked after the last one.
        opening: With position 0 only.
    """

    sequence: Count
    slot: Index
    position: Index
    length: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    sample: bool
    opening: Opening | None = None


Rows = Annotated[tuple[Row, ...], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]


class Activations(msgspec.Struct, frozen=True, array_like=True):
    """Meta of a frame of hidden states; its payload is the rows, in this order."""

    epoch: Count
    rows: Rows


class Pick(msgspec.Struct, frozen=True, array_like=True):
    """A token picked for ``sequence``; -1 with a finish ends it without one."""

    sequence: Count
    token: Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]
    finish: Finish = ""


class Feedback(msgspec.Struct, frozen=True, array_like=True):
    """Meta of a frame from the last stage to the first."""

    epoch: Count
    picks: Annotated[tuple[Pick, ...], msgspec.Meta(max_length=MAX_ROWS)]


ACTIVATIONS: Codec[Activations] = Codec(Activations, max_bytes=1 << 16)
FEEDBACK: Codec[Feedback] = Codec(Feedback, max_bytes=1 << 16)
