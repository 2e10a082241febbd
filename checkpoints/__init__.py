"""Checkpoints: canonical format, save, load, verify, convert (docs/checkpoint-format.md)."""
