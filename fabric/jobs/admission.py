"""May this job start on this mesh, and this member take part in it?"""

from __future__ import annotations

from collections.abc import Mapping

from fabric.core.errors import ResourceExhausted
from fabric.core.ids import PeerId
from fabric.jobs.ports import MemberFacts
from fabric.jobs.spec import JobSpec


def fits(spec: JobSpec, facts: MemberFacts) -> bool:
    """Return whether a member with ``facts`` may take part."""
    trusted = spec.require.trust == "member" or facts.trust == spec.require.trust
    return trusted and facts.memory_bytes >= spec.require.memory_bytes


def check_means(spec: JobSpec, members: Mapping[PeerId, MemberFacts]) -> None:
    """Refuse a job that the mesh cannot start now.

    Raises:
        ResourceExhausted: too few members fit; the reason says which rule they miss.
    """
    need = spec.require.min_peers
    if spec.kind == "serve":
        need = max(need, spec.serve.stages)
    fitting = [peer for peer, facts in members.items() if fits(spec, facts)]
    if len(fitting) >= need:
        return
    if len(members) < need:
        reason = f"the job needs {need} peers, the mesh has {len(members)}"
        raise ResourceExhausted(reason, next_step="invite more peers: fabric invite")
    best = max((facts.memory_bytes for facts in members.values()), default=0)
    reason = (
        f"the job needs {need} peers with trust {spec.require.trust!r} and "
        f"{spec.require.memory_bytes} B of free memory; {len(fitting)} of "
        f"{len(members)} fit (the most free memory is {best} B)"
    )
    raise ResourceExhausted(
        reason, next_step="lower require.memory_bytes or require.trust"
    )
