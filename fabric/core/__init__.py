"""Ids, errors, codec, framing and signing: no I/O, no clock, no torch."""
