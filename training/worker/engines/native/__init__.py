"""training.worker.engines.native: see ARCHITECTURE.md."""
