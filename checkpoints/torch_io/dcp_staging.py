"""The copy of a nested state_dict that ``dcp.async_save`` saves while training goes on.

The memory of each tensor is kept for the next save, found by its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch.distributed.tensor import DTensor

Place = tuple[str | int, ...]


class StagedCopy:
    """Copies of one state_dict after another, in the same memory."""

    def __init__(self) -> None:
        self._kept: dict[Place, torch.Tensor] = {}
        self._used: dict[Place, torch.Tensor] = {}

    def stage(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy whose tensors are on the CPU; values are copied too."""
        self._used = {}
        staged = {key: self._copy((key,), value) for key, value in state_dict.items()}
        self._kept = self._used  # what is gone from the state_dict is given back
        return staged

    def _copy(self, place: Place, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, DTensor):
            local = self._tensor(place, value.to_local())
            return DTensor.from_local(
                local,
                value.device_mesh,
                value.placements,
                run_check=False,
                shape=value.shape,
                stride=torch.empty(value.shape, device="meta").stride(),
            )
        if isinstance(value, torch.Tensor):
            return self._tensor(place, value)
        if isinstance(value, Mapping):
            return {k: self._copy((*place, str(k)), v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy((*place, k), v) for k, v in enumerate(value))
        return deepcopy(value)

    def _tensor(self, place: Place, value: torch.Tensor) -> torch.Tensor:
        kept = self._kept.get(place)
        if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
            kept = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        self._used[place] = kept
        return kept.copy_(value.detach())
