"""What the simulator models: networks, faults, attacks, scenarios."""
