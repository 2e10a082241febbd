"""The engine of the simulator: virtual time, randomness per purpose, the event log."""
