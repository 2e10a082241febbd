"""Job spec, state machine, coordinator, generations and epochs (no torch)."""
