"""Verbs about jobs: run, jobs, logs, wait, stop, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts

from fabric.app.cli_output import show_json, show_table, show_text, talk
from fabric.app.client import Job, connect
from fabric.app.config_loader import parse_assignment
from fabric.app.control_messages import COPIES_FACT, EventView, JobRow
from fabric.core.ids import short
from fabric.jobs.spec import load_spec


def run(
    spec: Path,
    *,
    set: Annotated[tuple[str, ...], cyclopts.Parameter(negative="")] = (),
    resume: str = "",
    dry_run: bool = False,
    follow: Annotated[bool, cyclopts.Parameter(name=("--follow", "-f"))] = False,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Submit a job and print its id.

    Args:
        spec: TOML file.
        set: Changes as key=value, e.g. --set train.outer.rounds=5.
        resume: Content root of the checkpoint to go on from; its round counts.
        dry_run: Print the resolved spec and stop.
        follow: Stay and print the job's events until it ends.
        home: Directory of the peer to talk to.
        json: Print JSON, a line each.
    """
    overrides = dict(parse_assignment(text) for text in set)
    if resume:
        overrides["resume"] = resume.removeprefix("blob:")
    resolved = load_spec(spec, overrides)
    if dry_run:
        show_json(resolved)
        return
    job = connect(home).submit(resolved)
    show_json({"job": job.id}) if json else show_text(job.id)
    if follow:
        _follow(job, since=0, json=json)
        job.result()


def jobs(*, home: Path | None = None, json: bool = False) -> None:
    """List the jobs of the mesh.

    Args:
        home: Directory of the peer to talk to.
        json: Print JSON, a line each.
    """
    rows = connect(home).jobs()
    if json:
        for row in rows:
            show_json(row)
        return
    show_table(
        (
            "JOB",
            "NAME",
            "KIND",
            "STATE",
            "ROUND",
            "CHECKPOINT",
            "PEERS",
            "COORDINATOR",
            "REASON",
        ),
        (
            (
                row.job[:8],
                row.name,
                row.kind,
                row.state,
                f"{row.round}/{row.rounds}" if row.rounds else None,
                checkpoint_text(row),
                peers_text(row),
                short(row.coordinator),
                row.reason,
            )
            for row in rows
        ),
    )


def peers_text(row: JobRow) -> str:
    """Return how many take part, and how many of them are not there."""
    away = sum(peer in row.absent for peer in row.participants)
    return f"{len(row.participants)}" + (f" ({away} away)" if away else "")


def checkpoint_text(row: JobRow) -> str | None:
    """Return the round of the newest checkpoint, and how many copies there are."""
    at, copies = (row.facts.get(k) for k in ("checkpoint_round", COPIES_FACT))
    return None if at is None else f"{at} ({copies})" if copies else str(at)


def logs(
    job: str,
    *,
    follow: Annotated[bool, cyclopts.Parameter(name=("--follow", "-f"))] = False,
    since: int = 0,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Print a job's events.

    Args:
        job: Job id or its beginning.
        follow: Stay until the job ends.
        since: First event number.
        home: Directory of the peer to talk to.
        json: Print JSON, a line each.
    """
    _follow(connect(home).job(job), since=since, json=json, follow=follow)


def wait(job: str, *, home: Path | None = None, json: bool = False) -> None:
    """Wait for a job's end; fail if it failed.

    Args:
        job: Job id or its beginning.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    row = connect(home).job(job).result()
    show_json(row) if json else show_text(row.state)


def stop(job: str, *, home: Path | None = None, json: bool = False) -> None:
    """Cancel a job.

    Args:
        job: Job id or its beginning.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    connect(home).job(job).stop()
    if json:
        show_json({"stopped": job})


def serve(
    root: str,
    *,
    stages: int = 2,
    port: int = 0,
    name: str = "fabric",
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Serve a checkpoint behind an OpenAI-compatible endpoint; print its URL.

    Args:
        root: Root of a checkpoint in the content store.
        stages: Peers to cut the layers over.
        port: Port on loopback; 0 takes a free one.
        name: Model name in the API.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    url = connect(home).serve(root, stages=stages, port=port, model_name=name)
    show_json({"url": url, "model": name}) if json else show_text(url)
    talk(f"try: curl {url}/models")


def _follow(job: Job, *, since: int, json: bool, follow: bool = True) -> None:
    for event in job.events(since=since, follow=follow):
        if json:
            show_json(event)
        else:
            show_text(line_of(event))


def line_of(event: EventView) -> str:
    """Return an event as one line for people."""
    facts = " ".join(f"{key}={_number(value)}" for key, value in event.facts.items())
    peer = short(event.peer) if event.peer else "-"
    return f"{event.seq:5d} {peer} {event.kind} {facts}"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def add_to(app: cyclopts.App) -> None:
    """Add these verbs to ``app``."""
    for verb in (run, jobs, logs, wait, stop, serve):
        app.command(verb)
