"""training.worker: see ARCHITECTURE.md."""
