"""What daemons tell each other about serving.

serve.models   anyone -> member        what it serves, and where to submit
serve.submit   gateway -> first stage  a session: prompt and sampling
serve.tokens   last stage -> gateway   tokens of its sessions, batched
serve.cancel   gateway -> first stage  the client went away
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fabric.core.codec import Codec
from fabric.core.ids import PeerId

MAX_PROMPT_TOKENS = 131_072
MAX_STOP_TOKENS = 16
MAX_BATCH_TOKENS = 4096
MAX_MODELS = 256

METHOD_MODELS = "serve.models"
METHOD_SUBMIT = "serve.submit"
METHOD_TOKENS = "serve.tokens"
METHOD_CANCEL = "serve.cancel"

Job = Annotated[str, msgspec.Meta(max_length=64)]
Session = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Peer = Annotated[PeerId, msgspec.Meta(max_length=64)]
Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Tokens = Annotated[tuple[Token, ...], msgspec.Meta(max_length=MAX_PROMPT_TOKENS)]
Index = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Finish = Literal["", "stop", "length", "error"]
"""Why a sequence ended; empty while it goes on."""


class Sampling(msgspec.Struct, frozen=True):
    """How the last stage picks tokens.

    Attributes:
        max_tokens: Tokens to generate at most.
        temperature: 0 picks the most likely token.
        top_p: Sample from the smallest set of tokens of this total probability.
        seed: Same seed, same tokens.
        stop_tokens: End the sequence, and are not part of it.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_PROMPT_TOKENS)]
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**53)] = 0
    stop_tokens: Annotated[
        tuple[Token, ...], msgspec.Meta(max_length=MAX_STOP_TOKENS)
    ] = ()


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Start a session; its tokens go to the peer that called."""

    job: Job
    session: Session
    prompt: Tokens
    sampling: Sampling


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """End a session of the caller; unknown ones are already over.

    A participant of the job may name another ``gateway``: one it cannot reach.
    """

    job: Job
    session: Session
    gateway: Annotated[str, msgspec.Meta(max_length=64)] = ""


class SessionToken(msgspec.Struct, frozen=True, array_like=True):
    """The ``index``-th generated token, or the end (``token`` -1 with a finish)."""

    session: Session
    index: Index
    token: Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]
    finish: Finish = ""


class TokenBatch(msgspec.Struct, frozen=True, tag="tokens"):
    """Tokens in the order of generation."""

    job: Job
    tokens: Annotated[
        tuple[SessionToken, ...], msgspec.Meta(max_length=MAX_BATCH_TOKENS)
    ]


class AskModels(msgspec.Struct, frozen=True, tag="ask_models"):
    """Ask what the receiver takes part in serving."""


class ServedModel(msgspec.Struct, frozen=True):
    """A model that is being served, and where its sessions start."""

    job: Job
    name: Annotated[str, msgspec.Meta(max_length=1000)]
    first_stage: Peer
    context_tokens: Index = 0
    """Prompt and generated tokens together; 0: unknown here."""


class Models(msgspec.Struct, frozen=True, tag="models"):
    """Everything the sender takes part in serving that is ready."""

    models: Annotated[tuple[ServedModel, ...], msgspec.Meta(max_length=MAX_MODELS)]


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """The request was carried out."""


ServeMessage = Submit | Cancel | TokenBatch | AskModels | Models | Taken

CODEC: Codec[ServeMessage] = Codec(ServeMessage, max_bytes=2 << 20)
