"""Checkpoints: canonical format, save, load, verify and convert.

``CanonicalWriter`` and ``CanonicalReader`` are storage for torch's distributed
checkpoints. Names resolve on first use (PEP 562), so that ``import checkpoints`` loads
no torch.
"""

from importlib import import_module

_PUBLIC = {
    "CanonicalWriter": "checkpoints.torch_io.dcp_writer",
    "CanonicalReader": "checkpoints.torch_io.dcp_reader",
}

__all__ = ["CanonicalReader", "CanonicalWriter"]


def __getattr__(name: str) -> object:
    """Return a public name, importing its module now."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'checkpoints' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
