"""Round trip and bandwidth of links between members."""
