"""The torch side of checkpoints: ``checkpoints.torch_io.tensors``."""
