"""Circuit relay v2: what we carry for others, and the slots others hold for us."""
