"""sims: see ARCHITECTURE.md."""
