"""Benchmarks: one command each, each against a named rival in the same run."""
