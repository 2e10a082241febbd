"""Many peers on one machine: real daemons on loopback, and the demo."""
