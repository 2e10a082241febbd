"""What the model is trained on: shards, the held-out part, and the order. Pure.

Byte-level: one token is one byte. A shard is named by the BLAKE3 of its bytes; whether
it is held out depends on that name alone, so every peer with the same text agrees
without a list, and a window never crosses two shards, so no training window can touch a
held-out byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from fabric.core.digest import digest
from fabric.core.errors import ConfigError

SHARD_BYTES = 16 << 10
"""Bytes per shard; the last one is shorter."""


@dataclass(frozen=True)
class Shard:
    """A piece of text and its content hash (32 bytes)."""

    name: bytes
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """The text in two disjoint parts, each in the order of the source."""

    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]


def cut(text: bytes) -> tuple[Shard, ...]:
    """Return ``text`` in shards of :data:`SHARD_BYTES`."""
    pieces = (text[at : at + SHARD_BYTES] for at in range(0, len(text), SHARD_BYTES))
    return tuple(Shard(digest(piece), piece) for piece in pieces)


def split(shards: Sequence[Shard], validation_fraction: float) -> Corpus:
    """Hold out about ``validation_fraction`` of the shards, chosen by their hash.

    At least one shard is held out (the one of the smallest hash) and equal shards fall
    on the same side.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    if not shards:
        raise ConfigError("the data source is empty", code="E_NO_DATA")
    limit = max(
        int(validation_fraction * 2**64).to_bytes(9, "big")[1:],
        min(shard.name[:8] for shard in shards),
    )
    train = tuple(shard for shard in shards if shard.name[:8] > limit)
    held_out = tuple(shard for shard in shards if shard.name[:8] <= limit)
    if not train:
        raise ConfigError(
            f"all {len(shards)} shards are held out for validation",
            code="E_NO_DATA",
            next_step="give more text or a smaller data.validation_fraction",
        )
    return Corpus(train, held_out)


def unigram_entropy(shards: Sequence[Shard]) -> float:
    """Return the entropy of single bytes, nats per byte: what a model must beat."""
    counts = [0] * 256
    for shard in shards:
        for value in range(256):
            counts[value] += shard.text.count(value)
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n)


def windows(
    shards: Sequence[Shard], key: str, batch_size: int, window_bytes: int
) -> list[bytes]:
    """Return ``batch_size`` windows that depend on the text and ``key`` alone.

    Args:
        shards: Where windows are cut; those shorter than a window are left out.
        key: Names the draw; see :func:`order_key`.
        batch_size: Windows to draw, with replacement.
        window_bytes: Context + 1: inputs and targets overlap by one.

    Raises:
        ConfigError: no shard is as long as a window.
    """
    usable = [shard.text for shard in shards if len(shard.text) >= window_bytes]
    if not usable:
        raise ConfigError(
            f"no shard holds a window of {window_bytes} B",
            code="E_NO_DATA",
            next_step="shorten model.context_tokens",
        )
    stream = blake3(key.encode()).digest(length=16 * batch_size)
    drawn = []
    for at in range(0, len(stream), 16):
        text = usable[int.from_bytes(stream[at : at + 8], "big") % len(usable)]
        room = len(text) - window_bytes + 1
        start = int.from_bytes(stream[at + 8 : at + 16], "big") % room
        drawn.append(text[start : start + window_bytes])
    return drawn


def order_key(seed: int, round_number: int, peer: str, step: int) -> str:
    """Name one inner step's draw: membership changes leave others' order untouched."""
    return f"train/{seed}/{round_number}/{peer}/{step}"
