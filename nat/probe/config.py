"""How links are measured, and how much of them that may use."""

from __future__ import annotations

import msgspec


class ProbeConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """When to probe, how much, and what is served to others."""

    max_links: int = 32
    """Peers whose links are measured; a published record has no room for more."""
    max_age_seconds: float = 600.0
    """A measurement older than this is repeated."""
    jitter: float = 0.2
    """Part of the age by which a repetition may come earlier."""
    retry_seconds: float = 60.0
    """First wait after a failed probe; doubled up to the age."""
    max_probe_bytes: int = 2 << 20
    """Sent in each direction by one probe, whatever the peer asks for."""
    max_probe_seconds: float = 0.25
    """Spent sending in each direction, and eight round trips more."""
    deadline_seconds: float = 10.0
    """A whole exchange takes no longer, or is given up."""
    busy_bytes_per_second: float = 131_072.0
    """A link that carries this much is not probed: its traffic is the measurement."""
    min_serve_interval_seconds: float = 60.0
    """One peer may have itself probed this often."""
    max_serves_per_minute: int = 64
    """Probes served to all peers together: 2 MiB each way, twice 32 links."""
    publish_interval_seconds: float = 10800.0
    """Links are published again this often, if a step changed (write budget)."""
    urgent_interval_seconds: float = 60.0
    """New or lost links and changes by half or more are published this often."""
