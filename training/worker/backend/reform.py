"""Goes on with whoever is left: a new world in the same process.

Which ranks are left, and that all of them agree, is the coordinator's to say: here it
is only done. torch keeps sizes and ranks of groups in its own tables, so a program
that asks torch gets a new world; sub-groups and meshes are made again by the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from fabric.core.errors import LocalProtocolError
from training.worker.backend.options import FabricOptions
from training.worker.backend.process_group import NAME


def reform(
    store: Store,
    left: Sequence[int],
    rank: int,
    options: FabricOptions,
    timeout: timedelta | None = None,
) -> None:
    """Replace torch's world by one of ``left``.

    Args:
        store: Fresh: nothing of the old world may be in it (a prefix per generation).
        left: Ranks of the old world that are left, in their new order.
        rank: Ours in the old world.
        options: Of the new world; names and links still by the old ranks.
        timeout: Of collectives; None: torch's default.

    Raises:
        LocalProtocolError: we are not among those left.
    """
    if rank not in left:
        raise LocalProtocolError(f"rank {rank} is not in the new world {list(left)}")
    if dist.is_initialized():
        world = dist.group.WORLD
        if world is not None:
            world.abort()
        dist.destroy_process_group()
    dist.init_process_group(
        NAME,
        store=store,
        rank=left.index(rank),
        world_size=len(left),
        timeout=timeout,
        pg_options=options,
    )
