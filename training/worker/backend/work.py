# mypy: disable-error-code="explicit-override"
"""The handle of a collective under way.

Not made by ``_create_work_from_future``: its ``wait`` swallows exceptions and ignores
the timeout, so that a failed collective looks successful.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work

from fabric.core.errors import FabricError, PeerTimeout


class FabricWork(Work):
    """Ends once, with tensors or with a FabricError that names the peer.

    Args:
        tensors: The result, complete when the work is.
        label: For errors.
        timed_out: Called when a caller's own timeout passes: the group ends.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        label: str,
        timed_out: Callable[[FabricError], None],
    ) -> None:
        super().__init__()
        self._tensors = tensors
        self._label = label
        self._timed_out = timed_out
        self._ended = threading.Event()
        self._error: FabricError | None = None
        self._future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self.source = -1

    def end(self, error: FabricError | None) -> None:
        """Note how it went; called once, from any thread."""
        self._error = error
        self._ended.set()
        if error is None:
            self._future.set_result(self._tensors)
        else:
            self._future.set_exception(error)  # type: ignore[arg-type]  # its stub is wrong

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return True when the result is there.

        Raises:
            FabricError: it will never be; PeerLost and PeerSilent say because of whom.
            PeerTimeout: not in time; the group is then over.
        """
        seconds = timeout.total_seconds() if timeout else 0.0
        if not self._ended.wait(seconds if seconds > 0 else None):
            self._timed_out(PeerTimeout(f"{self._label} took over {seconds:g} s"))
            self._ended.wait()
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Return whether it ended, well or not."""
        return self._ended.is_set()

    def is_success(self) -> bool:
        """Return whether it ended well."""
        return self._ended.is_set() and self._error is None

    def exception(self) -> FabricError | None:
        """Return what it failed with, if it did."""
        return self._error

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Return the future of the result."""
        return self._future

    def result(self) -> list[Tensor]:
        """Return the result; wait first."""
        return self._tensors

    def synchronize(self) -> None:
        """Wait."""
        self.wait()

    def source_rank(self) -> int:
        """Return whom a receive from any source received from."""
        return self.source

    _source_rank = source_rank
