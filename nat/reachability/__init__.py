"""Who reaches us: observed addresses, AutoNAT, the verdict, changes of the network."""
