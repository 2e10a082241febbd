"""nat: see ARCHITECTURE.md."""
