"""fabric.bulk: see ARCHITECTURE.md."""
