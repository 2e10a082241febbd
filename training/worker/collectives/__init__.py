"""Collectives over connected sockets: pure schedules, their choice, their execution."""
