"""How much of the network this peer may use, and how people write it."""

from __future__ import annotations

import re

import msgspec

from fabric.core.errors import ConfigError

_RATE = re.compile(r"(\d+(?:\.\d+)?)([kMG]?)(bit|B)(?:/s)?")
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
MIN_RATE_BYTES_PER_SECOND = 16_000.0
"""Below this a job's messages take longer than their deadlines."""


class BudgetConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Budgets of the data plane; 0 is unlimited.

    What we send is limited, by the kernel, to within 5 %. What we receive is limited by
    the budgets of those who send it.
    """

    max_up_bytes_per_second: float = 0.0
    """Of all data-plane connections together."""
    max_up_bytes_per_second_per_peer: float = 0.0
    """Of the connections with one peer together."""
    max_connections_per_peer: int = 64
    """Data-plane connections with one peer, both directions."""
    max_connections: int = 1024
    """Data-plane connections in all."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for rate in (
            self.max_up_bytes_per_second,
            self.max_up_bytes_per_second_per_peer,
        ):
            if rate and not rate >= MIN_RATE_BYTES_PER_SECOND:
                raise ValueError(
                    f"a budget of {rate:g} B/s is below the least useful one, "
                    f"{MIN_RATE_BYTES_PER_SECOND:g} B/s; 0 is unlimited"
                )
        if self.max_connections < 0 or self.max_connections_per_peer < 0:
            raise ValueError("a number of connections is 0 (unlimited) or more")


def parse_rate(text: str) -> float:
    """Return bytes per second of "20Mbit", "2.5MB", "800kbit/s".

    Raises:
        ConfigError: it is not a rate, or too low to be of use.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} is not a rate",
            code="E_BUDGET_FORM",
            next_step="write it as 20Mbit or 2.5MB (per second)",
        )
    number, scale, unit = match.groups()
    rate = float(number) * _SCALE[scale] / (8 if unit == "bit" else 1)
    if rate < MIN_RATE_BYTES_PER_SECOND:
        raise ConfigError(
            f"{text!r} is below {MIN_RATE_BYTES_PER_SECOND * 8 / 1e3:g} kbit",
            code="E_BUDGET_FORM",
            next_step="allow more, or do not start the daemon",
        )
    return rate


def parse_budget(text: str) -> tuple[float, dict[str, str]]:
    """Return the rate (0 = not given) and the other parts of "20Mbit,vram=80%".

    Raises:
        ConfigError: two rates, an empty part, or a part given twice.
    """
    rate = 0.0
    others: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name == "up":
            if rate:
                raise _malformed(f"{text!r} states two rates")
            rate = parse_rate(value if equals else name)
        elif not name or not value or name in others:
            raise _malformed(f"{part!r} in {text!r} is empty or given twice")
        else:
            others[name] = value
    return rate, others


def _malformed(reason: str) -> ConfigError:
    return ConfigError(
        reason, code="E_BUDGET_FORM", next_step="write it as 20Mbit,vram=80%"
    )
