"""What peers ask each other about copies: RPC ``replicas.ask``."""

from __future__ import annotations

from typing import Annotated

import msgspec

from fabric.core.codec import Codec

METHOD_ASK = "replicas.ask"
MAX_ASKED = 512
"""Roots in one question; 32 KiB."""

Root = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Places = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, lt=MAX_ASKED)], ...],
    msgspec.Meta(max_length=MAX_ASKED),
]


class ReplicaAsk(msgspec.Struct, frozen=True, tag="ask"):
    """Which of ``roots`` do you hold, whole?"""

    roots: Annotated[tuple[Root, ...], msgspec.Meta(max_length=MAX_ASKED)]


class ReplicaState(msgspec.Struct, frozen=True, tag="state"):
    """The answer.

    Attributes:
        holds: Places in the question of what is held whole.
        refuses: Places of what could not be copied here lately.
        room: Bytes that still fit.
    """

    holds: Places
    refuses: Places
    room: Annotated[int, msgspec.Meta(ge=0, lt=2**60)]


Message = ReplicaAsk | ReplicaState
CODEC: Codec[Message] = Codec(Message, max_bytes=1 << 16)
