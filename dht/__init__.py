"""dht: see ARCHITECTURE.md."""
