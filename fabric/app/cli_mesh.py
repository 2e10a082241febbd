"""Verbs about this peer in its mesh: invite, join, leave, status, why, down."""

from __future__ import annotations

import sys
from pathlib import Path

import cyclopts
import segno

from fabric.app.cli_output import (
    mbit,
    milliseconds,
    show_json,
    show_table,
    show_text,
)
from fabric.app.client import connect
from fabric.core.errors import ConfigError
from fabric.core.ids import short

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(text: str) -> float:
    """Return the seconds in "90", "90s", "15m", "2h" or "1d".

    Raises:
        ConfigError: none of these.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        return float(number) * _UNITS[unit]
    except ValueError:
        raise ConfigError(
            f"{text!r} is not a duration", next_step="write 90s, 15m, 2h or 1d"
        ) from None


def invite(
    *,
    role: str = "worker",
    ttl: str = "1h",
    uses: int = 1,
    qr: bool = False,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Print a token with which others can join; keep it secret.

    Args:
        role: worker, client, relay or verifier.
        ttl: How long it is good for: 90s, 15m, 2h, 1d.
        uses: How many peers may use it.
        qr: Also draw it, for a camera.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    token = connect(home).invite(role=role, ttl_seconds=seconds_of(ttl), uses=uses)
    show_json({"token": token}) if json else show_text(token)
    if qr:
        segno.make(token, error="l").terminal(sys.stderr, border=2, compact=True)


def join(token: str, *, home: Path | None = None, json: bool = False) -> None:
    """Join the mesh of an invite token.

    Args:
        token: What `fabric invite` printed.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    mesh = connect(home).join(token)
    show_json({"mesh": mesh}) if json else show_text(mesh)


def leave(*, home: Path | None = None, json: bool = False) -> None:
    """Leave the mesh and forget it.

    Args:
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    connect(home).leave()
    if json:
        show_json({"left": True})


def status(*, home: Path | None = None, json: bool = False) -> None:
    """Show this peer, its mesh and its peers.

    Args:
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    view = connect(home).status()
    if json:
        show_json(view)
        return
    mesh = f"{view.mesh_name} ({view.mesh[:8]})" if view.mesh else "no mesh"
    show_text(f"mesh {mesh}  {view.state}")
    show_text(f"you  {view.name} {view.peer} {view.role}".rstrip())
    show_table(
        ("PEER", "NAME", "ROLE", "ALIVE", "PATH", "RTT", "UP", "DOWN", "TRUST", "NOTE"),
        (
            (
                short(p.peer),
                p.name,
                p.role,
                p.liveness,
                p.path if p.connected else p.reach or "-",
                milliseconds(p.rtt_ms),
                mbit(p.up_mbit) or "-",
                mbit(p.down_mbit) or "-",
                p.trust.removeprefix("trusted (").removesuffix(")"),
                p.note,
            )
            for p in view.peers
        ),
        optional=("NOTE",),
    )


def why(subject: str, *, home: Path | None = None, json: bool = False) -> None:
    """Explain the state of a peer or a job.

    Args:
        subject: Peer id, end of it, name, or job id.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    lines = connect(home).why(subject)
    if json:
        show_json({"subject": subject, "lines": lines})
        return
    for line in lines:
        show_text(line)


def down(*, drain: bool = False, home: Path | None = None, json: bool = False) -> None:
    """End this machine's daemon.

    Args:
        drain: Leave running jobs first.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    connect(home).down(drain=drain)
    if json:
        show_json({"down": True})


def add_to(app: cyclopts.App) -> None:
    """Add these verbs to ``app``."""
    for verb in (invite, join, leave, status, why, down):
        app.command(verb)
