"""The flags of ``fabric up`` as settings: what people type most has a short form."""

from __future__ import annotations

from collections.abc import Iterable

from fabric.app.config_loader import parse_assignment
from fabric.core.errors import ConfigError
from fabric.net.budget_config import parse_budget, parse_rate

_RATES = {
    "peer": "data.budget.max_up_bytes_per_second_per_peer",
    "relay": "nat.relay.max_bytes_per_second",
}
_UP = "data.budget.max_up_bytes_per_second"
_CONNECTIONS = "data.budget.max_connections"


def settings_of(
    assignments: Iterable[str] = (),
    *,
    name: str | None = None,
    listen: str | None = None,
    relay_ok: bool | None = None,
    budget: str | None = None,
) -> dict[str, object]:
    """Return dotted settings and their values; the short forms win over ``--set``.

    Args:
        assignments: ``key=value``, as ``--set`` gives them.
        name: Shown to others.
        listen: Where the control plane listens; several with commas between.
        relay_ok: Relay for others always, or never; None: if the world reaches us.
        budget: As :func:`budget_settings` reads it.

    Raises:
        ConfigError: a text is malformed; which, and how to write it.
    """
    settings = dict(parse_assignment(text) for text in assignments)
    if name is not None:
        settings["name"] = name
    if listen is not None:
        settings["host.listen"] = listen.split(",")
    if relay_ok is not None:
        settings["nat.relay.volunteer"] = "always" if relay_ok else "never"
    if budget is not None:
        settings |= budget_settings(budget)
    return settings


def budget_settings(text: str) -> dict[str, object]:
    """Return the settings that "20Mbit,peer=5Mbit,relay=2MB,connections=200" means.

    Raises:
        ConfigError: malformed, or a part that nothing limits.
    """
    rate, parts = parse_budget(text)
    settings: dict[str, object] = {_UP: rate} if rate else {}
    for part, value in parts.items():
        if part in _RATES:
            settings[_RATES[part]] = parse_rate(value)
        elif part == "connections":
            settings[_CONNECTIONS] = _number(value)
        else:
            raise ConfigError(
                f"nothing limits {part!r} yet",
                code="E_BUDGET_PART",
                next_step="a budget has a rate, and peer=RATE, relay=RATE or "
                "connections=NUMBER",
            )
    return settings


def _number(text: str) -> int:
    if not text.isdecimal() or not text.isascii():
        raise ConfigError(
            f"{text!r} is not a number of connections",
            code="E_BUDGET_FORM",
            next_step="write it as connections=200",
        )
    return int(text)
