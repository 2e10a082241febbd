"""How peers find each other: mDNS, rendezvous, islands that merge."""
