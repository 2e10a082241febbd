"""The verb plan: which states to shard how far, before or while a job runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import cyclopts


@cyclopts.Parameter(name="*")
@dataclass(frozen=True)
class PlanFlags:
    """What a plan may assume and choose from.

    Attributes:
        links: TOML file of links instead of a mesh: docs/planning.md.
        job: Plan for the participants of this running job.
        measure: Have links that nobody knows measured now; takes a while.
        model: Checkpoint whose parameters to plan for, of any known format.
        memory: Per rank, e.g. 8GiB; default: 80 % of each machine's.
        flops: Per rank and second, as training reaches them.
        tokens: Of one step of all ranks; default: the job's batches.
        dtype: Of weights, gradients and activations.
        allow: Precisions on the way: int8, int4; none for exact ones alone.
        mode: Exact steps, an outer loop, or what is better.
        micro_steps: Numbers of micro-steps to choose from.
        overlap: Part of transfers that computing hides, 0 to 1.
        inner_steps: H of an outer loop; 0: chosen.
    """

    links: Path | None = None
    job: str = ""
    measure: bool = False
    model: Path | None = None
    memory: str = ""
    flops: float = 0.0
    tokens: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    allow: tuple[Literal["int8", "int4", "none"], ...] = ("int8",)
    mode: Literal["auto", "exact", "outer"] = "auto"
    micro_steps: tuple[int, ...] = (1,)
    overlap: float = 0.0
    inner_steps: int = 0


_DEFAULTS = PlanFlags()


def plan(
    spec: Path,
    *,
    set: Annotated[tuple[str, ...], cyclopts.Parameter(negative="")] = (),
    flags: PlanFlags = _DEFAULTS,
    rows: int = 8,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Show how to shard a job over its links, and why other ways are worse.

    Ends with 0, or with 6 when nothing fits the memory.

    Args:
        spec: TOML file of the job.
        set: Changes as key=value, e.g. --set model.num_layers=12.
        flags: What the plan may assume and choose from.
        rows: Schemes to show.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    # enumerating schemes needs modules that no other verb does
    from fabric.app.plan_run import run_plan

    run_plan(spec, set, flags, rows=rows, home=home, json=json)


def add_to(app: cyclopts.App) -> None:
    """Add this verb to ``app``."""
    app.command(plan)
