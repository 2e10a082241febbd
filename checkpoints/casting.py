"""Change the element type of weights, only when asked.

Rounds to nearest, ties to even, F64 by way of F32, as torch does. A finite number that
the new type cannot hold is refused: it would become infinite in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from checkpoints.hashed_file import Buffer
from fabric.core.errors import ConfigError

CASTS = ("F64", "F32", "F16", "BF16")
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def can_cast(dtype: str, to: str) -> bool:
    """Return whether this module turns one type into another, different one."""
    return dtype in CASTS and to in CASTS and dtype != to


def cast_windows(
    name: str, windows: Iterable[Buffer], dtype: str, to: str
) -> Iterator[Buffer]:
    """Yield the elements of ``windows`` as ``to``.

    Args:
        name: The tensor's, for messages.
        windows: Whole elements of type ``dtype``.
        dtype: One of :data:`CASTS`.
        to: Another.

    Raises:
        ConfigError: a finite element becomes infinite, or numpy is missing.
    """
    np = _numpy()
    with np.errstate(over="ignore"):
        for window in windows:
            yield memoryview(_cast(np, name, window, dtype, to)).cast("B")


def _cast(np: Any, name: str, window: Buffer, dtype: str, to: str) -> Any:  # noqa: ANN401 (numpy is an extra)
    if dtype == "BF16":
        wide = (np.frombuffer(window, "<u2").astype("<u4") << 16).view("<f4")
    else:
        wide = np.frombuffer(window, _NUMPY[dtype])
    narrow = wide.astype("<f4") if dtype == "F64" else wide
    if to == "BF16":
        result = _to_bfloat16(np, narrow.astype("<f4", copy=False))
        check = (result.astype("<u4") << 16).view("<f4")
    else:
        result = check = narrow.astype(_NUMPY[to])
    if np.count_nonzero(np.isfinite(check)) != np.count_nonzero(np.isfinite(wide)):
        raise ConfigError(
            f"{name!r} holds numbers too large for {to}",
            code="E_OVERFLOW",
            next_step="choose a wider type, or leave it as it is",
        )
    return result


def _to_bfloat16(np: Any, single: Any) -> Any:  # noqa: ANN401
    bits = single.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = np.isnan(single)
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype("<u2")


def _numpy() -> Any:  # noqa: ANN401
    try:
        return import_module("numpy")
    except ImportError as exc:
        raise ConfigError(
            "changing the element type needs numpy",
            code="E_EXTRA",
            next_step="pip install 'peerfabric[train]'",
        ) from exc
