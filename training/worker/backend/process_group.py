# mypy: disable-error-code="override,explicit-override,assignment"
# torch's stub overloads each method by two forms of call; programs use the one here.
"""torch's view of a group: the ProcessGroup that DDP, FSDP2 and DeepSpeed call.

A Python ProcessGroup replaces the whole group (one that also drives another device
needs its own mesh dimension), and torch never sets its name: DeviceMesh, functional
collectives and DTensor find it by the three name members below.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName

from fabric.core.errors import LocalProtocolError
from training.worker.backend.arguments import (
    OfTorch,
    by_dtype,
    listed,
    reduce_op,
    split,
)
from training.worker.backend.memory import TensorMemory
from training.worker.backend.requests import Request, Requests
from training.worker.backend.work import FabricWork
from training.worker.collectives.choose import Chooser
from training.worker.collectives.engine import Connector, Engine, Job, Prepared, one_way
from training.worker.collectives.links import Links
from training.worker.collectives.schedule import Do

NAME = "fabric"


class FabricProcessGroup(dist.ProcessGroup):
    """Collectives of one group over sockets.

    Args:
        rank: Ours in the group.
        names: Of the members, by rank.
        links: Between them.
        connector: Where sockets come from; owned by the group.
        patience_seconds: Silence of a peer for longer ends the group.
        timeout: Of each collective.
        group_name: torch's name of the group.
        algorithm: The one to take where it applies; empty: by estimate.
    """

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        links: Links,
        connector: Connector,
        *,
        patience_seconds: float,
        timeout: timedelta,
        group_name: str = "",
        algorithm: str = "",
    ) -> None:
        super().__init__(rank, len(names))  # type: ignore[call-arg]  # stub has one form
        self._name = group_name
        self._algorithm = algorithm
        self._patience = patience_seconds
        self._timeout = timeout
        self._begin(rank, names, links, connector)

    def _begin(
        self, rank: int, names: Sequence[str], links: Links, connector: Connector
    ) -> None:
        self._rank = rank
        self._requests = Requests(rank, Chooser(links, self._algorithm))
        self.engine = Engine(
            rank,
            names,
            connector,
            patience_seconds=self._patience,
            timeout_seconds=self._timeout.total_seconds(),
        )

    def reconfigure(
        self, rank: int, names: Sequence[str], links: Links, connector: Connector
    ) -> None:
        """Go on as ``rank`` of a new membership; what was under way has failed.

        torch keeps the size with which a group was made: programs that ask torch, and
        not this object, form their groups anew (``reform.py``).
        """
        self.engine.abort("the group is reconfigured")
        self.engine.close()
        self._begin(rank, names, links, connector)

    def use_links(self, links: Links) -> None:
        """Choose by ``links`` from the next collective on; every rank does, alike."""
        self._requests = Requests(self._rank, Chooser(links, self._algorithm))

    # -- names and numbers --------------------------------------------------------

    def size(self) -> int:
        """Return the number of members."""
        return self.engine.size

    def rank(self) -> int:
        """Return our rank."""
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """Return the backend's name."""
        return NAME

    @property
    def group_name(self) -> str:
        """Torch's name of the group."""
        return self._name

    def getGroupName(self) -> str:  # noqa: N802 - torch's name
        """Return torch's name of the group."""
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name
        super()._set_group_name(GroupName(name))

    def set_timeout(self, timeout: timedelta) -> None:
        """Bound each later collective."""
        self.engine.timeout_seconds = timeout.total_seconds()

    # -- collectives --------------------------------------------------------------

    def allreduce(self, tensors: OfTorch, opts: OfTorch = None) -> FabricWork:
        """Combine tensors of all ranks, in place."""
        given = listed(tensors)
        op, factor = reduce_op(opts)
        return self._all(by_dtype(given), given, op, factor)

    def allreduce_coalesced(
        self, tensors: list[Tensor], opts: OfTorch = None
    ) -> FabricWork:
        """Combine several tensors at once."""
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: OfTorch, opts: OfTorch = None) -> FabricWork:
        """Overwrite tensors with those of the root."""
        given = listed(tensors)
        root = opts if isinstance(opts, int) else getattr(opts, "rootRank", 0)
        requests = [self._requests.broadcast(g, root) for g in by_dtype(given)]
        return self._submit(requests, given)

    def reduce(self, tensors: list[Tensor], opts: OfTorch) -> FabricWork:
        """Combine tensors at the root."""
        op, factor = reduce_op(opts)
        requests = [
            self._requests.reduce(g, opts.rootRank, op, factor)
            for g in by_dtype(tensors)
        ]
        return self._submit(requests, tensors)

    def allgather(
        self,
        outputs: list[list[Tensor]],
        inputs: list[Tensor],
        opts: OfTorch = None,
    ) -> FabricWork:
        """Put the tensor of each rank into a list."""
        del opts
        requests = [
            self._requests.all_gather(o, i)
            for o, i in zip(outputs, listed(inputs), strict=True)
        ]
        return self._submit(requests, [t for o in outputs for t in o])

    def allgather_coalesced(
        self,
        outputs: list[list[Tensor]],
        inputs: list[Tensor],
        opts: OfTorch = None,
    ) -> FabricWork:
        """Gather several tensors; ``outputs[rank][number]``."""
        by_number = [list(row) for row in zip(*outputs, strict=True)]
        return self.allgather(by_number, inputs, opts)

    def _allgather_base(
        self, output: Tensor, own: Tensor, opts: OfTorch = None
    ) -> FabricWork:
        return self.allgather_into_tensor_coalesced([output], [own], opts)

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        opts: OfTorch = None,
    ) -> FabricWork:
        """Gather tensors end to end, by rank."""
        del opts
        requests, put_back = [], []
        for output, own in zip(outputs, inputs, strict=True):
            line = output.detach().contiguous()
            parts = list(line.view(self.size(), -1).unbind(0)) if line.numel() else []
            if parts:
                requests.append(self._requests.all_gather(parts, own))
            if line.data_ptr() != output.data_ptr():
                put_back.append((output, line))
        return self._submit(requests, outputs, put_back)

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def reduce_scatter(
        self,
        outputs: list[Tensor],
        inputs: list[list[Tensor]],
        opts: OfTorch = None,
    ) -> FabricWork:
        """Combine the i-th tensors of all ranks at rank i."""
        op, factor = reduce_op(opts)
        requests = [
            self._requests.reduce_scatter(o, i, op, factor)
            for o, i in zip(outputs, inputs, strict=True)
        ]
        return self._submit(requests, outputs)

    def _reduce_scatter_base(
        self,
        output: Tensor,
        own: Tensor,
        opts: OfTorch = None,
    ) -> FabricWork:
        return self.reduce_scatter_tensor_coalesced([output], [own], opts)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        opts: OfTorch = None,
    ) -> FabricWork:
        """Combine tensors, of which each rank gets one equal part."""
        parts = [
            list(i.detach().contiguous().view(self.size(), -1).unbind(0))
            for i in inputs
            if i.numel()
        ]
        return self.reduce_scatter([o for o in outputs if o.numel()], parts, opts)

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def gather(
        self,
        outputs: list[list[Tensor]],
        inputs: list[Tensor],
        opts: OfTorch,
    ) -> FabricWork:
        """Put the tensor of each rank into a list of the root."""
        into = outputs[0] if self._rank == opts.rootRank else []
        request = self._requests.gather(into, listed(inputs)[0], opts.rootRank)
        return self._submit([request], into)

    def scatter(
        self,
        outputs: list[Tensor],
        inputs: list[list[Tensor]],
        opts: OfTorch,
    ) -> FabricWork:
        """Give each rank one tensor of the root's list."""
        given = inputs[0] if self._rank == opts.rootRank else []
        output = listed(outputs)[0]
        request = self._requests.scatter(output, given, opts.rootRank)
        return self._submit([request], [output])

    def alltoall(
        self,
        outputs: list[Tensor],
        inputs: list[Tensor],
        opts: OfTorch = None,
    ) -> FabricWork:
        """Give each rank one tensor and take one from each."""
        del opts
        return self._submit([self._requests.all_to_all(outputs, inputs)], outputs)

    def alltoall_base(
        self,
        output: Tensor,
        own: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: OfTorch = None,
    ) -> FabricWork:
        """Give each rank a slice along the first dim and take one from each."""
        del opts
        line = output.detach().contiguous()
        into = split(line, output_splits, self.size())
        given = split(own.detach().contiguous(), input_splits, self.size())
        moved = [] if line.data_ptr() == output.data_ptr() else [(output, line)]
        request = self._requests.all_to_all(into, given)
        return self._submit([request], [output], moved)

    all_to_all_single = alltoall_base

    def barrier(self, opts: OfTorch = None) -> FabricWork:
        """Wait for everyone."""
        del opts
        return self._submit([self._requests.barrier()], [])

    # -- point to point -----------------------------------------------------------

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> FabricWork:
        """Send a tensor to ``peer``."""
        line = tensors[0].detach().contiguous()
        return self._one_way(Do.SEND, line, tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> FabricWork:
        """Receive a tensor from ``peer``."""
        line = tensors[0].detach().contiguous()
        return self._one_way(Do.RECEIVE, line, tensors, peer, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> FabricWork:
        """Refused: which peer sends first is not known before a connection exists."""
        raise LocalProtocolError(
            "receiving from any source is not supported",
            next_step="name the source rank",
        )

    # -- the end ------------------------------------------------------------------

    def abort(self) -> None:
        """End the group at once, here and at the peers."""
        self.engine.abort()

    def shutdown(self) -> None:
        """Finish what is queued and leave."""
        self.engine.close()

    # -- jobs ---------------------------------------------------------------------

    def _all(
        self, groups: list[list[Tensor]], tensors: list[Tensor], op: str, factor: float
    ) -> FabricWork:
        requests = [self._requests.all_reduce(g, op, factor) for g in groups]
        return self._submit(requests, tensors)

    def _submit(
        self,
        requests: Sequence[Request],
        result: Sequence[Tensor],
        put_back: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> FabricWork:
        """Run ``requests`` in order; the work ends with the last."""
        label = requests[0].label if requests else "nothing"
        work = FabricWork(list(result), label, self.engine.fail)
        if not requests:
            work.end(None)
            return work
        for request in requests[:-1]:
            # a group that fails fails what follows too: the last one tells
            self.engine.submit(
                Job(request.label, request.prepare, request.finish, lambda _error: None)
            )
        last = requests[-1]

        def finish() -> None:
            last.finish()
            for output, line in put_back:
                output.detach().copy_(line.view(output.shape))

        self.engine.submit(Job(last.label, last.prepare, finish, work.end))
        return work

    def _one_way(
        self, do: Do, line: Tensor, tensors: list[Tensor], peer: int, tag: int
    ) -> FabricWork:
        label = f"{do.value} {line.numel()} {line.dtype}, rank {peer}, tag {tag}"
        work = FabricWork(list(tensors), label, self.engine.fail)

        def prepare() -> Prepared:
            ours, waits = one_way(do, peer, line.numel())
            return Prepared(ours, TensorMemory([line]), waits)

        def finish() -> None:
            if do is Do.RECEIVE and line.data_ptr() != tensors[0].data_ptr():
                tensors[0].detach().copy_(line)

        job = Job(label, prepare, finish, work.end)
        self.engine.point_to_point(do, peer, tag, job)
        return work
