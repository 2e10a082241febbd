"""Names of torch.distributed.checkpoint and ours, both ways.

DCP flattens nested dicts into dotted names and remembers each value's path. The path
tells what a tensor is: ``("model", fqn)`` is ``model/<fqn>``, ``("optimizer", "state",
fqn, slot)`` is ``optimizer/<slot>/<fqn>``; a state_dict without nesting is a model's.
Anything else keeps its dotted name under ``other/``.
"""

from __future__ import annotations

from collections.abc import Mapping

from checkpoints.formats.source import MODEL, OPTIMIZER

Path = tuple[str | int, ...]

OTHER = "other/"
_OPTIMIZERS = ("optimizer", "optim")


def canonical_name(fqn: str, path: Path) -> str:
    """Return our name of a tensor that DCP calls ``fqn``."""
    inner = path[1:] if len(path) > 1 and path[0] in ("app", "state") else path
    if len(path) <= 1:
        return f"{MODEL}{fqn}"
    if inner[0] == "model" and len(inner) == 2:
        return f"{MODEL}{inner[1]}"
    if inner[0] in _OPTIMIZERS and len(inner) == 4 and inner[1] == "state":
        return f"{OPTIMIZER}{inner[3]}/{inner[2]}"
    return f"{OTHER}{fqn}"


def canonical_names(paths: Mapping[str, Path]) -> dict[str, str]:
    """Return our names by DCP's; where two would be one, both keep their own."""
    names = {fqn: canonical_name(fqn, path) for fqn, path in paths.items()}
    count: dict[str, int] = {}
    for name in names.values():
        count[name] = count.get(name, 0) + 1
    return {
        fqn: name if count[name] == 1 else f"{OTHER}{fqn}"
        for fqn, name in names.items()
    }


def nested_path(name: str) -> Path:
    """Return the path that DCP would have for a tensor of ours."""
    if name.startswith(MODEL):
        return ("model", name.removeprefix(MODEL))
    if name.startswith(OPTIMIZER):
        slot, _, fqn = name.removeprefix(OPTIMIZER).partition("/")
        if fqn:
            return ("optimizer", "state", fqn, slot)
    return (name,)


def dotted(path: Path) -> str:
    """Return DCP's name of a path."""
    return ".".join(map(str, path))
