"""Verbs about the network: doctor, ping, peers."""

from __future__ import annotations

from pathlib import Path
from textwrap import TextWrapper

import cyclopts

from fabric.app.addr_text import short_addr
from fabric.app.cli_output import (
    mbit,
    milliseconds,
    show_json,
    show_table,
    show_text,
    terminal_width,
)
from fabric.app.client import connect
from fabric.app.control_messages import PingView
from fabric.core.ids import short
from nat.doctor.findings import Finding

INDENT = " " * 22
"""Under the details of a finding."""
FAILED, NOT_CONNECTED = 1, 3
"""Exit codes of ``fabric doctor``; 0 when nothing fails."""
WATCH_SECONDS = 1.0
WATCH_COUNT = 100_000


def doctor(
    *, peer: str | None = None, home: Path | None = None, json: bool = False
) -> None:
    """Say what keeps peers from connecting, line by line, with what to do about it.

    Ends with 0 when no line fails, 1 when one does, 3 when --peer is not connected.

    Args:
        peer: Also the whole chain towards this peer: id, end of an id, or name.
        home: Directory of the peer to talk to.
        json: Print JSON, a line each.
    """
    findings = connect(home).doctor(peer or "")
    for finding in findings:
        if json:
            show_json(finding)
        else:
            show_text(finding_text(finding, terminal_width()))
    if status := exit_status(findings):
        raise SystemExit(status)


def finding_text(finding: Finding, width: int = 0) -> str:
    """Return a finding for people: one line, and a second when there is a next step.

    Args:
        finding: What was found.
        width: Columns to wrap at; 0 for none, as scripts like it.
    """
    line = f"{finding.status:4}  {finding.name:15} {finding.detail}"
    lines = [line if finding.status == "ok" else f"{line} ({finding.code})"]
    if finding.status != "ok":
        lines.append(f"{INDENT}next: {finding.next_step}")
    if width <= 2 * len(INDENT):
        return "\n".join(lines)
    wrap = TextWrapper(
        width,
        subsequent_indent=INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return "\n".join(wrap.fill(text) for text in lines)


def exit_status(findings: list[Finding]) -> int:
    """Return the exit code of a diagnosis."""
    failed = {finding.name for finding in findings if finding.status == "fail"}
    if "peer.path" in failed:
        return NOT_CONNECTED
    return FAILED if failed else 0


def ping(
    peer: str,
    *,
    count: int = 3,
    watch: bool = False,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Measure round trips to a peer, and show each path and its upgrade.

    Args:
        peer: Id, end of an id, or name.
        count: Round trips.
        watch: One a second until interrupted.
        home: Directory of the peer to talk to.
        json: Print JSON, a line each.
    """
    views = connect(home).ping(
        peer,
        WATCH_COUNT if watch else count,
        interval_seconds=WATCH_SECONDS if watch else 0.0,
    )
    for view in views:
        if json:
            show_json(view)
        else:
            show_text(ping_text(view))


def ping_text(view: PingView) -> str:
    """Return a round trip for people; a change of path shows both."""
    now = f"{view.path} {_short(view.rtt_ms)}"
    if view.before and view.before_ms is not None:
        now = f"{view.before} {_short(view.before_ms)} -> {now}"
    others = [kind for kind in view.paths if kind != view.path]
    also = f"  (also {', '.join(others)})" if others else ""
    return f"{short(view.peer)} {now}{also}"


def _short(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.2f} ms"


def peers(*, all: bool = False, home: Path | None = None, json: bool = False) -> None:
    """List the other members that are there: paths, links, versions, addresses.

    Args:
        all: Also the dead: members of whom only a record is left.
        home: Directory of the peer to talk to.
        json: Print JSON, a line each.
    """
    rows = [
        row for row in connect(home).status().peers if all or row.liveness != "dead"
    ]
    if json:
        for row in rows:
            show_json(row)
        return
    show_table(
        (
            "PEER",
            "NAME",
            "ALIVE",
            "PATHS",
            "RTT",
            "UP",
            "DOWN",
            "VERSION",
            "ADDRESS",
            "NOTE",
        ),
        (
            (
                short(row.peer),
                row.name,
                row.liveness,
                ", ".join(row.control) or "-",
                milliseconds(row.rtt_ms),
                mbit(row.up_mbit),
                mbit(row.down_mbit),
                row.version,
                short_addr(row.addrs[0]) if row.addrs else None,
                row.note,
            )
            for row in rows
        ),
        optional=("UP", "DOWN", "NOTE"),
    )


def add_to(app: cyclopts.App) -> None:
    """Add these verbs to ``app``."""
    for verb in (doctor, ping, peers):
        app.command(verb)
