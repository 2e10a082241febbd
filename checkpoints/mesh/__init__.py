"""Checkpoints among peers: see ARCHITECTURE.md."""
