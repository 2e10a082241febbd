"""The report of ``fabric plan``: from a job and its links to a plan for people.

Runs in the client: enumerating schemes takes a second that a daemon does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from checkpoints.formats.registry import open_source
from fabric.app.plan_messages import PlanLinksView
from fabric.core.errors import ConfigError, ResourceExhausted
from fabric.core.ids import PeerId
from fabric.jobs.plan.baselines import as_written, flat, three_level, two_level
from fabric.jobs.plan.ground import Ground
from fabric.jobs.plan.measured import PeerFacts, ground_of
from fabric.jobs.plan.planner import Option, find_plan, price
from fabric.jobs.plan.replication import Replication, replication_of
from fabric.jobs.plan.schemes import PlanSettings, Precision
from fabric.jobs.plan.shapes import ModelShape, builtin_shape, shape_of
from fabric.jobs.plan.times import Flows, link_bytes
from fabric.jobs.plan.verdicts import level_name, why, with_reasons
from fabric.jobs.spec import JobSpec, ModelSpec
from fabric.jobs.topology.islands import topology_of

CPU_FLOPS = 1.5e10
"""Per core, where nothing better is known: fp32 products of a small model."""
MEMORY_SHARE = 0.8
"""Of a machine's memory that a plan may use."""
MAX_ROWS = 50


class PlanRow(msgspec.Struct, frozen=True, kw_only=True):
    """One scheme of the table.

    Attributes:
        name: Of a known scheme; empty for those the planner made.
        degrees: Ranks that share weights, gradients, optimizer states: "2|8|384".
        together: Ranks that step together; several such groups run an outer loop.
        level_bytes: Per step over the links of each level, innermost first.
        fits: Whether every rank has the memory.
        why: Why it was chosen, or what it lost by.
    """

    name: str
    degrees: str
    together: str
    inner_steps: int
    weights: Precision
    gradients: Precision
    outer: str
    micro_steps: int
    recompute: bool
    memory_bytes: int
    memory: dict[str, int]
    seconds: float
    compute_seconds: float
    hidden_seconds: float
    tokens_per_second: float
    level_bytes: tuple[int, ...]
    transfers: dict[str, float]
    fits: bool
    chosen: bool
    why: str


class LinkRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan moves per step over the boundary of one place."""

    place: str
    level: str
    into_bytes: int
    out_bytes: int


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything ``fabric plan`` prints.

    Attributes:
        levels: Name of the links of each level, innermost first.
        cuts: Why the islands are where they are.
        rows: The best of each family of degrees; the fastest that fit first.
        compared: Known schemes, for comparison.
        replication: Of the chosen scheme.
        links: Bytes of the chosen scheme by place.
        notes: What was assumed.
    """

    parameters: int
    ranks: int
    tokens_per_step: int
    levels: tuple[str, ...]
    cuts: tuple[str, ...]
    best: PlanRow | None
    rows: tuple[PlanRow, ...]
    compared: tuple[PlanRow, ...]
    replication: tuple[Replication, ...]
    links: tuple[LinkRow, ...]
    considered: int
    notes: tuple[str, ...]


def model_of(spec: ModelSpec, path: Path | None) -> ModelShape:
    """Return the shape of a job's model, or of the checkpoint at ``path``.

    Raises:
        ConfigError: the model is neither built in nor on this machine.
    """
    if path is not None:
        with open_source(path) as source:
            names = [name for name in source.names() if name not in source.aliases]
            model = [name for name in names if name.startswith("model/")] or names
            tensors = {
                name.removeprefix("model/"): source.entry(name).shape for name in model
            }
        return shape_of(tensors, spec.context_tokens, spec.num_heads)
    if spec.source.startswith("builtin:"):
        return builtin_shape(spec)
    raise ConfigError(
        f"the shapes of {spec.source} are not on this machine",
        next_step="`fabric ckpt fetch ROOT DIR`, then --model DIR",
    )


def ground_of_view(
    view: PlanLinksView, memory_bytes: int = 0, flops: float = 0.0
) -> Ground:
    """Return the ground that a daemon's members and links make.

    Args:
        view: The daemon's answer.
        memory_bytes: Per rank instead of each machine's.
        flops: Per rank instead of an estimate by its cores.

    Raises:
        ResourceExhausted: there is no member.
    """
    if not view.members:
        raise ResourceExhausted("no member could take part")
    facts = {
        PeerId(member.peer): PeerFacts(
            name=member.name,
            memory_bytes=memory_bytes or int(member.memory_bytes * MEMORY_SHARE),
            flops=flops or max(1, member.cpus) * CPU_FLOPS,
        )
        for member in view.members
    }
    records = {PeerId(peer): record for peer, record in view.records.items()}
    hosts = {PeerId(member.peer): member.host for member in view.members}
    return ground_of(topology_of(records, facts, hosts=hosts), facts)


def report_of(
    spec: JobSpec,
    ground: Ground,
    shape: ModelShape,
    settings: PlanSettings,
    notes: Sequence[str] = (),
) -> PlanReport:
    """Return the plan of ``spec`` on ``ground`` and what it was compared with."""
    plan = with_reasons(find_plan(ground, shape, settings), ground, settings)
    flows, outer = Flows(ground), spec.train.outer
    form: Precision = "int8" if outer.quantise == "int8" else "fp32"
    known = [flat(flows, settings), two_level(flows, settings)]
    if ground.root.level >= 2:
        known.append(three_level(flows, settings))
    known.append(as_written(flows, settings, outer.inner_steps, form))
    compared = []
    for scheme in known:
        option = price(flows, shape, scheme, settings)
        reason = why(option, plan.best, ground, settings)
        compared.append(msgspec.structs.replace(option, why=reason))
    best = plan.best
    replication: tuple[Replication, ...] = ()
    links: list[LinkRow] = []
    if best is not None:
        replication = replication_of(ground, shape, best.scheme, best.cost, settings)
        links = [
            LinkRow(
                place=name,
                level=level_name(ground, level),
                into_bytes=taken,
                out_bytes=given,
            )
            for name, level, taken, given in link_bytes(
                flows, shape, best.scheme, settings
            )
        ]
    rows = [row_of(option, settings) for option in plan.options]
    return PlanReport(
        parameters=shape.numel,
        ranks=len(ground.ranks),
        tokens_per_step=settings.tokens_per_step,
        levels=ground.levels,
        cuts=ground.reasons,
        best=row_of(best, settings) if best is not None else None,
        rows=tuple(rows[:MAX_ROWS]),
        compared=tuple(row_of(option, settings) for option in compared),
        replication=replication,
        links=tuple(links),
        considered=plan.considered,
        notes=tuple(notes),
    )


def row_of(option: Option, settings: PlanSettings) -> PlanRow:
    """Return an option as a row."""
    scheme, cost = option.scheme, option.cost
    return PlanRow(
        name=scheme.name,
        degrees=scheme.degrees,
        together=scheme.sync.degree,
        inner_steps=scheme.inner_steps,
        weights=scheme.weight_precision,
        gradients=scheme.gradient_precision,
        outer="" if scheme.is_exact else scheme.outer_precision,
        micro_steps=scheme.micro_steps,
        recompute=scheme.recompute,
        memory_bytes=option.memory.total,
        memory=option.memory.parts,
        seconds=cost.seconds,
        compute_seconds=cost.compute_seconds,
        hidden_seconds=cost.hidden_seconds,
        tokens_per_second=settings.tokens_per_step / cost.seconds,
        level_bytes=cost.level_bytes,
        transfers={each.name: each.seconds for each in cost.transfers},
        fits=option.fits,
        chosen=option.chosen,
        why=option.why,
    )
