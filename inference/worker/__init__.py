"""inference.worker: see ARCHITECTURE.md."""
