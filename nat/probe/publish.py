"""When a job's measured links are published again: the write budget of link records."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.core.ids import PeerId
from fabric.net.ports import LinkMeasurement
from nat.probe.config import ProbeConfig
from nat.probe.estimate import is_urgent, quantise_link

REFRESH_SECONDS = 6 * 3600.0
"""A record lives for a day; an unchanged one is written again this often."""


class LinkSheet:
    """What we last published of one job's links, and whether it still stands."""

    def __init__(self, config: ProbeConfig) -> None:
        self._config = config
        self._published: dict[PeerId, LinkMeasurement] = {}
        self._at: float | None = None

    def update(
        self, measured: Mapping[PeerId, LinkMeasurement], now: float
    ) -> dict[PeerId, LinkMeasurement] | None:
        """Return the steps to publish now, or None while the record may stand.

        Args:
            measured: Our links to members of the job; at most ``max_links`` are taken.
            now: Monotonic seconds.
        """
        chosen = sorted(measured)[: self._config.max_links]
        steps = {
            peer: quantise_link(measured[peer], self._published.get(peer))
            for peer in chosen
        }
        if self._at is None:
            due = bool(steps)
        else:
            due = now - self._at >= self._interval(steps)
        if not due:
            return None
        self._published, self._at = steps, now
        return steps

    def failed(self) -> None:
        """Take back what :meth:`update` returned: it comes again within a minute."""
        self._published = {}

    def _interval(self, steps: Mapping[PeerId, LinkMeasurement]) -> float:
        if steps == self._published:
            return REFRESH_SECONDS
        urgent = steps.keys() != self._published.keys() or any(
            is_urgent(link, self._published.get(peer)) for peer, link in steps.items()
        )
        config = self._config
        return (
            config.urgent_interval_seconds
            if urgent
            else config.publish_interval_seconds
        )
