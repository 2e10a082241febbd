"""checkpoints.torch_io: see ARCHITECTURE.md."""
