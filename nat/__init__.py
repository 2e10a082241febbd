"""Ways to peers behind NATs, put together in ``service.py``; see ARCHITECTURE.md."""
