"""Hole punching: TCP simultaneous open, DCUtR, spares, upgrades of relayed paths."""
