"""Simulated peers: the production cores, driven in virtual time."""
