"""One source of randomness per purpose, all from the seed of the run.

What one part of the model draws must not shift what another draws: a scenario with
fewer lost messages is otherwise the same run.
"""

from __future__ import annotations

import random

from fabric.core.digest import digest
from fabric.core.signing import Ed25519Signer


def stream(seed: int, purpose: str) -> random.Random:
    """Return the randomness of ``purpose`` in the run with ``seed``."""
    return random.Random(int.from_bytes(digest(f"{seed}/{purpose}".encode())[:8]))


def key(seed: int, name: str) -> Ed25519Signer:
    """Return the identity of ``name`` in the run with ``seed``."""
    return Ed25519Signer(digest(f"{seed}/key/{name}".encode()))
