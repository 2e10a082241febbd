"""Which stage holds which layers, and which peer is which stage."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.core.ids import PeerId


def layer_range(num_layers: int, stage: int, stages: int) -> range:
    """Return the layers of ``stage``: contiguous, sizes differing by at most one.

    The later stages get the larger share, as the first also embeds and schedules.

    Raises:
        ValueError: no such stage, or more stages than layers.
    """
    if not 0 <= stage < stages or stages > num_layers:
        raise ValueError(f"stage {stage} of {stages} over {num_layers} layers")
    return range(stage * num_layers // stages, (stage + 1) * num_layers // stages)


def chain(participants: Sequence[PeerId], stages: int) -> tuple[PeerId, ...]:
    """Return the peer of each stage, in order; empty when there are too few.

    Every participant computes the same chain; those beyond it stand by.
    """
    ordered = sorted(participants)
    return tuple(ordered[:stages]) if len(ordered) >= stages else ()
