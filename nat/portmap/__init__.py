"""Port mapping: PCP, NAT-PMP and UPnP IGD; leases renewed, and removed at the end."""
