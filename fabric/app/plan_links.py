"""Members and links for a plan, as this peer's replica and prober know them."""

from __future__ import annotations

from functools import partial

from crdt_store.link_records import LinkRecord
from fabric.app.domains import domain_of_record
from fabric.app.link_survey import own_links, survey
from fabric.app.links import as_record
from fabric.app.peer_names import name_of
from fabric.app.plan_messages import PlanLinks, PlanLinksView, PlanMember
from fabric.app.session import Session
from fabric.core.ids import JobId, PeerId
from fabric.jobs.spec import MAX_PEERS
from nat.probe.estimate import quantise_link


async def plan_links(
    session: Session, request: PlanLinks, job: JobId | None
) -> PlanLinksView:
    """Return who would train and what their links were measured to be.

    Of a job the records of that job alone count: everybody holds the same. Without one
    those of all jobs and our own measurements do.
    """
    store, own = session.store, session.own
    if job is not None:
        views = [view for view in session.jobs.jobs() if view.job == job]
        members = sorted(peer for view in views for peer in view.participants)
        records = dict(store.links.get(job))
    else:
        there = {*store.members.live(), own} & store.authority.members()
        members = sorted(there)[: max(1, min(request.max_peers, MAX_PEERS))]
        records = _known(session)
    unasked: tuple[str, ...] = ()
    if request.measure:
        measure = partial(own_links, session.probe)
        records, unasked = await survey(
            session.rpc, own, measure, members, _among(records, members)
        )
    return PlanLinksView(
        members=tuple(_member(session, peer) for peer in members),
        records={str(p): record for p, record in _among(records, members).items()},
        unasked=unasked,
    )


def _known(session: Session) -> dict[PeerId, LinkRecord]:
    """Return all links that were published for any job, or measured here."""
    found: dict[PeerId, LinkRecord] = {}
    for view in session.jobs.jobs():
        for peer, record in session.store.links.get(view.job).items():
            known = found.get(peer, LinkRecord())
            found[peer] = LinkRecord(links={**known.links, **record.links})
    mine = {p: quantise_link(link, None) for p, link in session.probe.links().items()}
    if mine:
        known = found.get(session.own, LinkRecord())
        found[session.own] = LinkRecord(links={**known.links, **as_record(mine).links})
    return found


def _among(
    records: dict[PeerId, LinkRecord], members: list[PeerId]
) -> dict[PeerId, LinkRecord]:
    among = set(members)
    return {
        peer: LinkRecord(links={p: k for p, k in record.links.items() if p in among})
        for peer, record in records.items()
        if peer in among
    }


def _member(session: Session, peer: PeerId) -> PlanMember:
    record = session.store.members.get(peer)
    if record is None:
        return PlanMember(peer=peer, name=name_of(session, peer))
    return PlanMember(
        peer=peer,
        name=name_of(session, peer),
        memory_bytes=record.hardware.memory_bytes,
        cpus=record.hardware.cpus,
        host=domain_of_record(record).host,
    )
