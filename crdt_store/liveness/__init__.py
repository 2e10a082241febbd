"""Who is there now: probes with suspicion, in memory only, never in slots."""
