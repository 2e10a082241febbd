"""fabric.app: see ARCHITECTURE.md."""
