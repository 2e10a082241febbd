"""What the verb plan does: collect members and links, plan, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from fabric.app.cli_output import show_json, show_table, show_text, talk
from fabric.app.cli_plan import PlanFlags
from fabric.app.client import connect
from fabric.app.config_loader import parse_assignment
from fabric.app.control_messages import JobRow
from fabric.app.planning import (
    LinkRow,
    PlanReport,
    PlanRow,
    ground_of_view,
    model_of,
    report_of,
)
from fabric.core.errors import ConfigError
from fabric.jobs.plan.ground import Ground
from fabric.jobs.plan.linkfile import load_ground
from fabric.jobs.plan.quantities import parse_size, seconds_text, size_text
from fabric.jobs.plan.schemes import PlanSettings, Precision
from fabric.jobs.plan.shapes import ModelShape
from fabric.jobs.spec import JobSpec, load_spec

MAX_LINKS_SHOWN = 8
RESOURCES = 6
"""Exit code when nothing fits."""


def run_plan(
    spec: Path,
    changes: Sequence[str],
    flags: PlanFlags,
    *,
    rows: int,
    home: Path | None,
    json: bool,
) -> None:
    """Print the plan of the job in ``spec``; end with 6 when nothing fits.

    Args:
        spec: TOML file of the job.
        changes: As key=value.
        flags: What the plan may assume and choose from.
        rows: Schemes to show.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    job = load_spec(spec, dict(parse_assignment(text) for text in changes))
    if job.kind != "train":
        raise ConfigError(
            f"a {job.kind} job has no states to shard",
            next_step="plans are for jobs of kind train",
        )
    shape = model_of(job.model, flags.model)
    ground, notes = _ground(job, shape, flags, home)
    settings = _settings(job, shape, ground, flags)
    report = report_of(job, ground, shape, settings, notes)
    if json:
        show_json(report)
    else:
        show_report(report, rows)
    if report.best is None:
        raise SystemExit(RESOURCES)


def _ground(
    spec: JobSpec, shape: ModelShape, flags: PlanFlags, home: Path | None
) -> tuple[Ground, list[str]]:
    memory = parse_size(flags.memory) if flags.memory else 0
    if flags.links is not None:
        ground = load_ground(flags.links)
        changes = {"memory_bytes": memory, "flops": flags.flops}
        given = {name: value for name, value in changes.items() if value}
        ranks = tuple(msgspec.structs.replace(r, **given) for r in ground.ranks)
        return msgspec.structs.replace(ground, ranks=ranks), []
    client = connect(home)
    if flags.measure:
        talk("measuring links, one member at a time ...")
    view = client.plan_links(
        flags.job, max_peers=spec.require.max_peers, measure=flags.measure
    )
    notes = [f"not asked to measure: {line}" for line in view.unasked]
    flops = flags.flops
    if not flops and flags.job:
        flops = _measured_flops(client.job(flags.job).status(), shape)
        if flops:
            notes.append(f"speed is the job's: {flops:.3g} operations/s of each rank")
    if not flops:
        notes.append("speed is guessed from cores: --flops says better")
    if not any(record.links for record in view.records.values()):
        notes.append(
            "no link is measured (they are while a job runs): --measure does it now"
        )
    return ground_of_view(view, memory, flops), notes


def _measured_flops(row: JobRow, shape: ModelShape) -> float:
    """Return what each participant computes; 0: no round has ended.

    By its last round, exchange included: in an outer loop that is little of it.
    """
    tokens = row.facts.get("tokens_per_second", 0.0)
    if isinstance(tokens, str) or not row.participants:
        return 0.0
    return tokens * shape.flops_per_token / len(row.participants)


def _settings(
    spec: JobSpec, shape: ModelShape, ground: Ground, flags: PlanFlags
) -> PlanSettings:
    coarse: tuple[Precision, ...] = tuple(p for p in flags.allow if p != "none")
    per_rank = spec.train.batch_size * max(1, shape.context_tokens)
    return PlanSettings(
        tokens_per_step=flags.tokens or per_rank * len(ground.ranks),
        dtype=flags.dtype,
        weight_precisions=(flags.dtype, *coarse),
        gradient_precisions=(flags.dtype, *coarse),
        outer_precisions=coarse or ("fp32",),
        micro_steps=flags.micro_steps,
        mode=flags.mode,
        overlap=flags.overlap,
        inner_steps=flags.inner_steps,
        block=spec.train.outer.block,
    )


def show_report(report: PlanReport, rows: int) -> None:
    """Print a plan for people: where the cuts are, the table, what a loss costs."""
    show_text(
        f"{report.parameters:,} parameters on {report.ranks} ranks, "
        f"{report.tokens_per_step:,} tokens a step"
    )
    for line in report.cuts:
        show_text(f"  {line}")
    show_text("under the name of a link: bytes over all such links in a step")
    shown = [row for row in report.rows if not row.chosen][: max(0, rows - 1)]
    best = (report.best,) if report.best is not None else ()
    _table(report, (*best, *shown))
    show_text("known schemes on the same links:")
    _table(report, report.compared)
    hidden = report.considered - len(shown) - len(best)
    if hidden > 0:
        show_text(f"{hidden} more were priced; --json has the best of each degrees")
    if report.best is None:
        show_text("nothing fits the memory: more ranks, --micro-steps, or --allow int4")
    for link in _outermost(report):
        show_text(
            f"{link.place}: {size_text(link.into_bytes)} in and "
            f"{size_text(link.out_bytes)} out a step at {link.level}"
        )
    for each in report.replication:
        often = f", every {each.every_steps} steps" if each.every_steps > 1 else ""
        sent = f"{size_text(each.bytes_each)}{often}" if each.every_steps else "0 B"
        show_text(f"loss of {each.what}: {each.loss} (copies: {sent})")
    for note in report.notes:
        talk(f"note: {note}")


def _outermost(report: PlanReport) -> list[LinkRow]:
    """Return the links that are the scarcest, as a rule: those of the last level."""
    last = report.levels[-1] if report.levels else ""
    return [link for link in report.links if link.level == last][:MAX_LINKS_SHOWN]


def _table(report: PlanReport, rows: tuple[PlanRow, ...]) -> None:
    columns = ("", "W|G|O", "TOGETHER", "H", "WIRE", "MEMORY", "STEP")
    marks = ["*" if row.chosen else str(at) for at, row in enumerate(rows, 1)]
    show_table(
        (*columns, *(name.upper() for name in report.levels)),
        (
            (
                mark,
                row.degrees,
                row.together,
                row.inner_steps if row.outer else None,
                _wire(row),
                size_text(row.memory_bytes),
                seconds_text(row.seconds),
                *(size_text(size) if size else "-" for size in row.level_bytes),
            )
            for mark, row in zip(marks, rows, strict=True)
        ),
        optional=("H",),
    )
    for mark, row in zip(marks, rows, strict=True):
        name = f"{row.name}: " if row.name else ""
        show_text(f"  {mark} {name}{row.why}")


def _wire(row: PlanRow) -> str:
    same = row.weights == row.gradients
    text: str = row.weights if same else f"{row.weights}+{row.gradients}"
    text += f", outer {row.outer}" if row.outer else ""
    text += f", {row.micro_steps} micro" if row.micro_steps > 1 else ""
    return text + (", recompute" if row.recompute else "")
