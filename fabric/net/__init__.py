"""fabric.net: see ARCHITECTURE.md."""
