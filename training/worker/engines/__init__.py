"""training.worker.engines: see ARCHITECTURE.md."""
