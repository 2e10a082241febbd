"""Publishes the measured links of each job we take part in (``l/<job>/<peer>``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

import trio

from crdt_store.link_records import LinkRecord, PublishedLink
from fabric.core.errors import FabricError
from fabric.core.ids import JobId, PeerId
from fabric.net.ports import LinkMeasurement
from nat.probe.config import ProbeConfig
from nat.probe.publish import LinkSheet

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Members that joined a job are measured this soon."""

Members = Callable[[], Mapping[JobId, Iterable[PeerId]]]
"""The running jobs we take part in, each with its participants."""
Near = Callable[[], Collection[PeerId]]
"""Members that show addresses of our site."""


class LinkSource(Protocol):
    """What measures: ``nat.probe.service.ProbeService``."""

    def set_members(
        self, members: Iterable[PeerId], near: Collection[PeerId] = frozenset()
    ) -> None:
        """Keep the links with these peers measured, those ``near`` among them."""
        ...

    def links(self) -> dict[PeerId, LinkMeasurement]:
        """Return every measurement known."""
        ...


class LinkTable(Protocol):
    """Where links are published: ``crdt_store.link_views.Links``."""

    async def put(self, job: JobId, record: LinkRecord) -> None:
        """Publish our links in ``job``."""
        ...


async def publish_links(
    source: LinkSource,
    table: LinkTable,
    members: Members,
    config: ProbeConfig,
    near: Near = frozenset,
) -> None:
    """Let ``source`` measure the members of our jobs and publish until cancelled."""
    sheets: dict[JobId, LinkSheet] = {}
    while True:
        jobs = {job: frozenset(peers) for job, peers in members().items()}
        source.set_members(
            frozenset[PeerId]().union(*jobs.values()), near() if jobs else ()
        )
        sheets = {job: sheets.get(job) or LinkSheet(config) for job in jobs}
        known = source.links()
        for job, peers in jobs.items():
            mine = {peer: link for peer, link in known.items() if peer in peers}
            steps = sheets[job].update(mine, trio.current_time())
            if steps is not None and not await _published(table, job, steps):
                sheets[job].failed()
        await trio.sleep(LOOK_SECONDS)


async def _published(
    table: LinkTable, job: JobId, steps: Mapping[PeerId, LinkMeasurement]
) -> bool:
    try:
        await table.put(job, as_record(steps))
    except FabricError as exc:  # a full disk, a role that may not write: jobs go on
        logger.warning("links.unpublished job=%s code=%s", job[:8], exc.code)
        return False
    return True


def as_record(steps: Mapping[PeerId, LinkMeasurement]) -> LinkRecord:
    """Return measurements in the form that is published."""
    return LinkRecord(
        links={
            peer: PublishedLink(
                rtt_microseconds=round(link.rtt_seconds * 1e6),
                up_bytes_per_second=round(link.up_bytes_per_second),
                down_bytes_per_second=round(link.down_bytes_per_second),
                path=link.path,
            )
            for peer, link in steps.items()
        }
    )
