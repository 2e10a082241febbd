"""crdt_store: see ARCHITECTURE.md."""
