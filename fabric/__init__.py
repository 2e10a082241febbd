"""fabric: see ARCHITECTURE.md."""
