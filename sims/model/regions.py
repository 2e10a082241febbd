"""One-way latency between regions of the world, from public cloud measurements.

Half of typical round trips between data centres; homes add a few milliseconds, which
``jitter`` covers. "lan" is one room: a switch between all.
"""

from __future__ import annotations

from fabric.core.errors import ConfigError

_ROUND_TRIP_MS = {
    ("eu", "eu"): 20, ("eu", "us-east"): 85, ("eu", "us-west"): 145,
    ("eu", "asia"): 230, ("eu", "brazil"): 200, ("eu", "australia"): 270,
    ("us-east", "us-east"): 20, ("us-east", "us-west"): 65, ("us-east", "asia"): 170,
    ("us-east", "brazil"): 115, ("us-east", "australia"): 200,
    ("us-west", "us-west"): 20, ("us-west", "asia"): 110, ("us-west", "brazil"): 175,
    ("us-west", "australia"): 140, ("asia", "asia"): 50, ("asia", "brazil"): 270,
    ("asia", "australia"): 120, ("brazil", "brazil"): 20,
    ("brazil", "australia"): 310, ("australia", "australia"): 20,
    ("lan", "lan"): 0.4,
}  # fmt: skip
_ELSEWHERE_MS = 100.0
"""Between a room and a region."""
REGIONS = frozenset(region for pair in _ROUND_TRIP_MS for region in pair)


def one_way_seconds(one: str, other: str) -> float:
    """Return the latency from region ``one`` to region ``other``."""
    found = _ROUND_TRIP_MS.get((one, other), _ROUND_TRIP_MS.get((other, one)))
    return (_ELSEWHERE_MS if found is None else found) / 2000


def check_region(name: str) -> str:
    """Return ``name`` if there is such a region.

    Raises:
        ConfigError: there is none.
    """
    if name not in REGIONS:
        raise ConfigError(
            f"no region {name!r}", next_step=f"regions: {', '.join(sorted(REGIONS))}"
        )
    return name
