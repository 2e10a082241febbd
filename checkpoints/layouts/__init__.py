"""Which dimension tensor parallelism splits, by the names of tensors: data."""
