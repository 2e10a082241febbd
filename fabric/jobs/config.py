"""Bounds and periods of the jobs service."""

from __future__ import annotations

import msgspec


class JobsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many jobs a daemon serves, and how long it waits for its own disk."""

    max_jobs: int = 64
    """Jobs with a task of their own; further specs wait until one ends."""
    log_events: int = 1000
    """Events kept per job, in RAM; the oldest are dropped."""
    save_timeout_seconds: float = 600.0
    """Longest a worker may take to write a checkpoint."""
    status_period_seconds: float = 60.0
    """How often the coordinator looks whether its job's status slot is still right."""
    progress_seconds: float = 9000.0
    """Numbers alone are written again after this time divided by the participants: the
    share of 2/5 of a write per peer and hour that is a running job's. Whoever wants
    them sooner asks the coordinator."""
    refresh_seconds: float = 5.0
    """Replicated specs are looked through at least this often."""
    retire_seconds: float = 60.0
    """How often what is kept of jobs that are over is looked through."""
    max_ended: int = 64
    """Jobs that ended here whose events are kept, the last to end."""
    max_scratch: int = 8
    """Jobs that are over whose scratch directory stays, for people who read its
    ``worker.log``; the last used."""
