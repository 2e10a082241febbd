"""The torch.distributed backend ``fabric``."""
