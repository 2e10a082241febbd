"""Checkpoints: canonical format, save, load, verify and convert."""
