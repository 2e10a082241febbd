"""Which states to shard how far over unequal links: the cost model and the plan."""
