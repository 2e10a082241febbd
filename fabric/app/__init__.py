"""Configuration, wiring, the daemon, its control API, client and command line."""
