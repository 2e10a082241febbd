"""Peer Fabric: train and serve models on machines you do not keep in one data centre.

``fabric.connect()`` and ``fabric.aconnect()`` reach the local daemon. Names resolve on
first use (PEP 562), so that ``import fabric`` loads nothing.
"""

from importlib import import_module

_PUBLIC = {
    "connect": "fabric.app.client",
    "aconnect": "fabric.app.aclient",
    "FabricError": "fabric.core.errors",
    "JobSpec": "fabric.jobs.spec",
}

__all__ = ["FabricError", "JobSpec", "aconnect", "connect"]


def __getattr__(name: str) -> object:
    """Return a public name, importing its module now."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fabric' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
