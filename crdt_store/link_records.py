"""What a slot ``l/<job>/<peer>`` holds: types alone, for those who only read them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
MAX_LINKS = 32
"""Of one record: it must fit a slot of 4 KiB (about 90 B each)."""


class PublishedLink(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One link as its one end measured it, in steps of 10 %.

    Attributes:
        rtt_microseconds: Round trip.
        up_bytes_per_second: From the author to the peer; 0 when not measured.
        down_bytes_per_second: From the peer to the author; 0 when not measured.
        path: What carried it.
    """

    rtt_microseconds: Count
    up_bytes_per_second: Count = 0
    down_bytes_per_second: Count = 0
    path: Literal["direct", "punched", "relay"] = "direct"


class LinkRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A peer's links to members of one job."""

    links: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=64)], PublishedLink],
        msgspec.Meta(max_length=MAX_LINKS),
    ] = {}
